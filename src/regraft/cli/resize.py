"""``regraft resize``: another rank for the same adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.base import open_base
from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.errors import UsageError
from regraft.ops._common import names_in
from regraft.ops.resize import Sizes, resize_adapter
from regraft.report.ops_tables import resize_table


def resize(
    adapter: o.AdapterArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="File or folder to write.")],
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Of every module; beside --energy, the most that any may have.")
    ] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Share of each module's ‖ΔW‖² to keep.")] = None,
    per_module: Annotated[
        str | None, typer.Option("--per-module", metavar="GLOB=N|SHARE,…", help="Ranks or shares of some modules.")
    ] = None,
    to_lora: Annotated[
        bool, typer.Option("--to-lora", help="Turn LoHa, LoKr and Tucker modules into the LoRA that they equal.")
    ] = False,
    base: Annotated[Path | None, typer.Option("--base", metavar="BASE", help="For its module names alone.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="Of the output; by default the input's.")] = None,
    save_dtype: Annotated[str | None, typer.Option("--save-dtype", help="Of the output's tensors.")] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Give an adapter a lower rank by SVD, or a higher one by zeros."""
    with progress("Resizing", quiet=quiet or json) as tick:
        report = resize_adapter(
            adapter,
            output,
            Sizes(rank, energy, _per_module(per_module)),
            to_lora=to_lora,
            format=format,
            save_dtype=o.dtype(save_dtype, "--save-dtype") if save_dtype is not None else None,
            names=names_in(open_base(base)) if base is not None else None,
            overwrite=overwrite,
            tick=tick,
        )
    emit(report, json=json, quiet=quiet, table=lambda console: resize_table(report, console))


def _per_module(text: str | None) -> tuple[tuple[str, int | float], ...]:
    """``*attn1*=8,*ff*=0.9`` as pairs.

    Raises:
        UsageError: a part is no GLOB=SIZE.
    """
    sizes = []
    for part in (text or "").split(","):
        glob, sign, size = part.rpartition("=")
        number = o.number_or_share(size.strip(), "--per-module") if sign else None
        if number is not None and glob.strip():
            sizes.append((glob.strip(), number))
        elif part.strip():
            raise UsageError(f"--per-module {part!r} can't be read", remedy="Give '*attn1*=8,*ff*=0.9'.")
    return tuple(sizes)
