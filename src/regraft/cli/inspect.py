"""``regraft inspect``: what an adapter file is."""

from __future__ import annotations

from pathlib import Path

import typer

from regraft.cli._sink import emit
from regraft.inspection import inspect_adapter
from regraft.report.inspect_table import print_inspection


def inspect(
    file: Path = typer.Argument(..., help="Adapter: a weights file, or a PEFT folder."),
    json: bool = typer.Option(False, "--json", help="Print the record as JSON."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print nothing: the exit code alone tells."),
) -> None:
    """Say what an adapter file is: format, model family, components, ranks."""
    report = inspect_adapter(file)
    emit(report, json=json, quiet=quiet, table=lambda console: print_inspection(report, console))
