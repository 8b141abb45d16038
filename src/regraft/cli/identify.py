"""``regraft identify``: which of these bases was an adapter made for?"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.formats import load_adapter
from regraft.identify import identify_base
from regraft.report.identify_schema import IdentifyReport

Bases = Annotated[
    list[str], typer.Argument(metavar="BASE", help="Files, folders or hub ids, or a folder of such, to look among.")
]


def identify(adapter: o.AdapterArgument, bases: Bases, json: o.Json = False, quiet: o.Quiet = False) -> None:
    """Find the base that an adapter was made for, by hashes, fingerprints and names."""
    loaded = load_adapter(adapter, whole=False)
    with progress("Hashing", quiet=quiet) as tick:
        report = identify_base(loaded, bases, tick=tick)
    emit(report, json=json, quiet=quiet, table=lambda console: print_identification(report, console))


def print_identification(report: IdentifyReport, console: Console) -> None:
    """Draw the report: the answer, what the adapter says of its base, and a row per candidate."""
    console.print(escape(report.summary), soft_wrap=True)
    for clue in report.clues:
        value = clue.value if len(clue.value) <= 64 else f"{clue.value[:61]}…"
        console.print(f"  {escape(clue.source)}  [dim]{escape(value)}[/]")
    table = Table(box=None, pad_edge=False)
    for name in ("match", "base", "family", "why"):
        table.add_column(name)
    for candidate in report.candidates:
        why = "; ".join(candidate.evidence)
        table.add_row(candidate.match, escape(candidate.path), escape(candidate.family or "–"), escape(why))
    console.print()
    console.print(table)
