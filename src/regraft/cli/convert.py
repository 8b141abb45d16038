"""``regraft convert``: the same adapter in another file format."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.markup import escape

from regraft.cli._sink import emit
from regraft.inspection import convert_adapter


def convert(
    file: Path = typer.Argument(..., help="Adapter: a weights file, or a PEFT folder."),
    output: Path = typer.Option(..., "--output", "-o", help="A .safetensors file, or a folder for PEFT."),
    format: str = typer.Option(..., "--format", help="peft, diffusers, kohya or cloneofsimo."),
    base: Path | None = typer.Option(None, "--base", help="The base, for its module names, if its family is unknown."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the output if it exists."),
    json: bool = typer.Option(False, "--json", help="Print the record as JSON."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print nothing on success."),
) -> None:
    """Write an adapter in another file format, for the same base."""
    report = convert_adapter(file, output, format, base=base, overwrite=overwrite)
    line = f"{escape(report.output)}  {report.format}, {report.modules} modules"
    emit(report, json=json, quiet=quiet, table=lambda console: console.print(line, soft_wrap=True))
