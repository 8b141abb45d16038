"""The terminal view of `InspectReport`."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regraft.families import get_family
from regraft.report.schema import ComponentSummary, InspectReport

# Beyond these, a list says how many more there are: the JSON has them all.
_LISTED, _METADATA_LISTED, _VALUE_WIDTH = 5, 12, 60


def print_inspection(report: InspectReport, console: Console) -> None:
    """Draw the report: what the file is, a row per component, and what was not understood."""
    family = get_family(report.family)
    console.print(f"[bold]{escape(report.file)}[/]")
    console.print(f"format  {report.format}")
    console.print(f"family  {f'{report.family} ({family.title})' if family else 'not recognised'}")
    console.print()
    console.print(_components(report.components))
    for token, shape in report.tokens.items():
        console.print(f"token   {escape(token)}  {_size(shape)}")
    _metadata(report.metadata, console)
    if report.unrecognised:
        count = len(report.unrecognised)
        console.print(f"\n[yellow]{count} key{'s' if count > 1 else ''} not understood[/]")
        for key in report.unrecognised[:_LISTED]:
            console.print(f"  {escape(key)}")
        if count > _LISTED:
            console.print(f"  … and {count - _LISTED} more")


def _components(components: dict[str, ComponentSummary]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("component")
    table.add_column("modules", justify="right")
    for name in ("kinds", "rank", "alpha"):
        table.add_column(name)
    for name, summary in components.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary.kinds.items())
        table.add_row(name, str(summary.modules), kinds, _few(summary.ranks), _few(summary.alphas))
    return table


def _few(values: list[int] | list[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:_LISTED])
    return f"{shown}, … to {values[-1]:g}" if len(values) > _LISTED else shown or "–"


def _size(shape: list[int]) -> str:
    return " × ".join(str(size) for size in shape)


def _metadata(metadata: dict[str, str], console: Console) -> None:
    if not metadata:
        return
    console.print(f"\nmetadata ({len(metadata)})")
    for key, value in sorted(metadata.items())[:_METADATA_LISTED]:
        line = " ".join(value.split())
        cut = line if len(line) <= _VALUE_WIDTH else f"{line[:_VALUE_WIDTH]}…"
        console.print(f"  {escape(key)}  {escape(cut)}")
    if len(metadata) > _METADATA_LISTED:
        console.print(f"  … and {len(metadata) - _METADATA_LISTED} more: see --json")
