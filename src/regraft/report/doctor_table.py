"""What ``regraft doctor`` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regraft.hub.access import LOGIN
from regraft.report.doctor_schema import DoctorReport


def doctor_table(report: DoctorReport, console: Console) -> None:
    """Print what is here, then what is missing for which verb."""
    console.print(f"[bold]regraft {escape(report.regraft_version)}[/]  Python {report.python}, torch {report.torch}")
    console.print(f"[dim]{escape(report.platform)}[/]")
    for device in report.devices:
        memory = "" if device.memory_mb is None else f", {device.memory_mb / 1000:.0f} GB"
        half = "" if device.bfloat16 else ", no bfloat16"
        console.print(f"  {escape(device.name):<8}{escape(device.description)}{memory}{half}")
    console.print(
        f"  {'memory':<8}{report.free_mb / 1000:.1f} of {report.memory_mb / 1000:.1f} GB free, "
        f"{report.processors} processors"
    )
    console.print(f"  {'cache':<8}{escape(report.cache)}, {report.cache_mb:.1f} MB")
    token = "set" if report.hub_token else f"not set; push and gated bases take one: {LOGIN}"
    console.print(f"  {'hub':<8}token {escape(token)}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for title in ("package", "version", "for"):
        table.add_column(title)
    for package in report.packages:
        version = "[red]missing[/]" if package.version is None else escape(package.version)
        table.add_row(escape(package.name), version, escape(package.purpose))
    console.print(table)
    broken = [verb for verb in report.verbs if verb.missing]
    if not broken:
        console.print("[green]every verb has what it needs[/]")
    for verb in broken:
        what = f" ({escape(verb.part)})" if verb.part else ""
        console.print(f"[red]{escape(verb.verb)}[/]{what} lacks {escape(', '.join(verb.missing))}")
        for command in verb.get:
            console.print(f"    {escape(command)}")
    for name, place in report.tools.items():
        if not place:
            console.print(f"[dim]{escape(name)} is not there: only the benchmark's pictures need it[/]")
