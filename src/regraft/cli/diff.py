"""``regraft diff``: two adapters beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.ops.diff import diff_adapters
from regraft.report.ops_tables import diff_table


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="An adapter: a file, or a PEFT folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of any format.")],
    base: Annotated[Path | None, typer.Option("--base", metavar="BASE", help="For its module names alone.")] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare two adapters module by module: how large, how alike, what is only in one."""
    with progress("Comparing", quiet=quiet or json) as tick:
        report = diff_adapters(first, second, base=base, tick=tick)
    emit(report, json=json, quiet=quiet, table=lambda console: diff_table(report, console))
