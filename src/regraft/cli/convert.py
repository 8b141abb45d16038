"""``regraft convert``: the same adapter in another file format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.errors import UsageError
from regraft.ops.convert import convert_adapter
from regraft.report.ops_tables import convert_table

Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="A .safetensors file, or a folder for PEFT.")
]
FormatName = Annotated[
    str, typer.Option("--format", metavar="NAME", help="As `inspect` says it: peft, diffusers, kohya, ….")
]
BaseOption = Annotated[
    Path | None,
    typer.Option(
        "--base",
        metavar="BASE",
        help="Its base: refactors what the format can't hold, and names what regraft has no table of.",
    ),
]
Energy = Annotated[
    float | None, typer.Option("--energy", help="Share of ‖ΔW‖² that a refactored change keeps; 0.999 unless given.")
]
StripPrivate = Annotated[
    bool, typer.Option("--strip-private", help="Leave out paths, names, prompts and tag lists; lists them.")
]
SaveDtype = Annotated[str | None, typer.Option("--save-dtype", help="Of the output's tensors.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")]


def convert(
    adapter: o.AdapterArgument,
    format: FormatName,
    output: Output = None,
    base: BaseOption = None,
    energy: Energy = None,
    strip_private: StripPrivate = False,
    save_dtype: SaveDtype = None,
    dry_run: DryRun = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write an adapter in another file format, for the same base."""
    if output is None and not dry_run:
        raise UsageError("--output is missing", remedy="Give the new file's name with -o, or --dry-run.")
    with progress("Converting", quiet=quiet or json) as tick:
        report = convert_adapter(
            adapter,
            output or adapter,
            format,
            base=base,
            energy=energy,
            private=not strip_private,
            save_dtype=o.dtype(save_dtype, "--save-dtype") if save_dtype is not None else None,
            dry_run=dry_run,
            overwrite=overwrite,
            tick=tick,
        )
    emit(report, json=json, quiet=quiet, table=lambda console: convert_table(report, console))
