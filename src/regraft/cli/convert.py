"""``regraft convert``: the same adapter in another file format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from regraft.cli import _options as o
from regraft.cli._sink import emit
from regraft.inspection import convert_adapter

Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="A .safetensors file, or a folder for PEFT.")
]
FormatName = Annotated[
    str, typer.Option("--format", metavar="NAME", help="peft, diffusers, kohya or cloneofsimo, as `inspect` says it.")
]
BaseOption = Annotated[
    Path | None, typer.Option("--base", metavar="BASE", help="The base, for its module names, if regraft lacks them.")
]


def convert(
    adapter: o.AdapterArgument,
    output: Output,
    format: FormatName,
    base: BaseOption = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write an adapter in another file format, for the same base."""
    report = convert_adapter(adapter, output, format, base=base, overwrite=overwrite)
    line = f"{escape(report.output)}  {report.format}, {report.modules} modules"
    emit(report, json=json, quiet=quiet, table=lambda console: console.print(line, soft_wrap=True))
