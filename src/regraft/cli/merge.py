"""``regraft merge``: several adapters in one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.errors import UsageError
from regraft.ops.merge import How, Settings, merge_adapters
from regraft.report.ops_tables import merge_table


def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Two or more, of any format.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="File or folder to write.")],
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W,…", help="A factor for each; 1 unless given.")
    ] = None,
    how: Annotated[str, typer.Option("--how", help="concat (exact, ranks add up) or svd (cut to --rank).")] = "concat",
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="svd: of each module; by default the highest.")
    ] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="svd: share of ‖ΔW‖² to keep instead.")] = None,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="BASE", help="Their base: for DoRA, IA3, OFT, GLoRA.")
    ] = None,
    format: Annotated[str | None, typer.Option("--format", help="Of the output; by default the first one's.")] = None,
    save_dtype: Annotated[str | None, typer.Option("--save-dtype", help="Of the output's tensors.")] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Put several adapters for one base together, each with its weight."""
    if how not in ("concat", "svd"):
        raise UsageError(f"--how {how!r} is not known", remedy="Known: concat, svd.")
    with progress("Merging", quiet=quiet or json) as tick:
        report = merge_adapters(
            adapters,
            output,
            Settings(_weights(weights, len(adapters)), cast(How, how), rank, energy),
            base=base,
            format=format,
            save_dtype=o.dtype(save_dtype, "--save-dtype") if save_dtype is not None else None,
            overwrite=overwrite,
            tick=tick,
        )
    emit(report, json=json, quiet=quiet, table=lambda console: merge_table(report, console))


def _weights(text: str | None, count: int) -> tuple[float, ...]:
    if text is None:
        return (1.0,) * count
    try:
        return tuple(o.finite(float(part), "--weights") for part in text.split(","))
    except ValueError:
        raise UsageError(f"--weights {text!r} can't be read", remedy="Give one for each, such as 0.8,0.5.") from None
