"""The terminal view of a refine."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regraft.report.refine_schema import RefineReport


def refine_table(report: RefineReport, console: Console) -> None:
    """Where it began, where it came to, and what it took."""
    console.print(f"[bold cyan]REFINED[/]  {escape(report.summary)}")
    console.print()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    why = f" ({report.start_reason})" if report.start_reason else ""
    rows = [
        ("start", f"{report.start}{why}"),
        ("objective", f"{report.objective} ({report.objective_reason})"),
        ("inputs", report.inputs),
        ("trained", f"{report.trained:,} numbers in {report.modules} modules"),
        ("stopped", report.stopped),
        ("took", f"{report.seconds:.0f} s, {report.peak_mb:.0f} MB at most"),
        *(("written", output) for output in report.outputs),
    ]
    for name, value in rows:
        facts.add_row(name, escape(value))
    console.print(facts)
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("on held-out inputs")
    table.add_column("of what is wanted", justify="right")
    for row in report.beside:
        table.add_row(escape(row.title), f"{row.recovered:.1%}")
    console.print(table)
    for name, why in list(report.untrained.items())[:8]:
        console.print(f"[dim]not trained: {escape(name)}: {escape(why)}[/]", soft_wrap=True)
