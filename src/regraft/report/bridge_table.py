"""What ``regraft bridge run`` and ``regraft bridge train`` print."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from regraft.report.bridge_schema import BridgeReport, BridgeTrainReport


def bridge_table(report: BridgeReport, console: Console) -> None:
    """Print each text beside the new base's own, what was done, and what was written."""
    for text in report.texts:
        console.print(f"[bold]{escape(text.prompt)}[/]")
        for name, said in (("new alone", text.new), ("bridged", text.bridged)):
            console.print(f"  [dim]{name:<10}[/]{escape(said)}")
    ends = report.strength if isinstance(report.strength, tuple) else (report.strength,)
    strength = " to ".join(f"{value:g}" for value in ends)
    console.print(f"[dim]{escape(report.way)}; strength {strength}, {report.seconds:.0f} s[/]")
    for note in report.notes:
        console.print(f"[dim]note[/]  {escape(note)}")
    for output in report.outputs:
        console.print(f"[dim]written[/]  {escape(output)}")


def bridge_text(report: BridgeReport) -> str:
    """The texts as a file has them."""
    blocks = [f"# {t.prompt}\n\n## new alone\n{t.new}\n\n## bridged\n{t.bridged}\n" for t in report.texts]
    return "\n".join(blocks)


def bridge_train_table(report: BridgeTrainReport, console: Console) -> None:
    """Print what was paired, how the loss went, and what was written."""
    console.print(f"[bold]{escape(report.source.path)}[/] → [bold]{escape(report.target.path)}[/]")
    for level in report.levels:
        sizes = f"{level.inner} → {level.outer} channels" + (", twice the size" if level.grows else "")
        console.print(f"  {escape(level.old)} → {escape(level.new)}  [dim]{sizes}[/]")
    console.print(f"[dim]{report.trained:,} numbers, {report.fusion}; learnt from {escape(report.data)}[/]")
    for look in report.looks:
        told = [
            f"{name} {value:.4f}" for name, value in (("loss", look.loss), ("held out", look.held)) if value is not None
        ]
        console.print(f"  step {look.step:>6}  {'  '.join(told)}  [dim]{look.seconds:.0f} s[/]")
    console.print(f"[dim]{escape(report.stopped)}; {report.seconds:.0f} s, {report.peak_mb:.0f} MB[/]")
    if report.unkept:
        console.print(f"[dim]note[/]  {escape(f'the state was not kept: {report.unkept}')}")
    for output in report.outputs:
        console.print(f"[dim]written[/]  {escape(output)}")
