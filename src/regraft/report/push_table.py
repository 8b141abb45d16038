"""What ``regraft push`` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from regraft.report.push_schema import PushReport


def push_table(report: PushReport, console: Console) -> None:
    """Print what was sent, and where it is."""
    for name in report.files:
        console.print(f"[dim]sent[/]  {escape(name)}")
    if report.address:
        console.print(escape(report.address), soft_wrap=True)
    for output in report.outputs:
        console.print(f"[dim]written[/]  {escape(output)}")
