"""What ``regraft bridge run`` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from regraft.report.bridge_schema import BridgeReport


def bridge_table(report: BridgeReport, console: Console) -> None:
    """Print each text beside the new base's own, what was done, and what was written."""
    for text in report.texts:
        console.print(f"[bold]{escape(text.prompt)}[/]")
        for name, said in (("new alone", text.new), ("bridged", text.bridged)):
            console.print(f"  [dim]{name:<10}[/]{escape(said)}")
    console.print(f"[dim]{escape(report.way)}; strength {report.strength:g}, {report.seconds:.0f} s[/]")
    for note in report.notes:
        console.print(f"[dim]note[/]  {escape(note)}")
    for output in report.outputs:
        console.print(f"[dim]written[/]  {escape(output)}")


def bridge_text(report: BridgeReport) -> str:
    """The texts as a file has them."""
    blocks = [f"# {t.prompt}\n\n## new alone\n{t.new}\n\n## bridged\n{t.bridged}\n" for t in report.texts]
    return "\n".join(blocks)
