"""The record of a family's speed as tables: for the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from regraft.bench.table import markdown as markdown_table
from regraft.report.speed_schema import MethodSpeed, RunningSpeed, SpeedCurve, SpeedReport

HEADS = ("", "cold s", "× reading", "warm s", "× files", "memory MB", "plain way s", "faster", "apart")


def rows(report: SpeedReport) -> Iterator[tuple[str, ...]]:
    """One row for each job: its name and the columns of `HEADS`."""
    yield "reading both once", _seconds(report.read_s), "1.0", "–", "–", "–", "–", "–", "–"
    ratio = _times(report.check_s, report.read_s)
    yield "inspect, 200 MB", _seconds(report.inspect_s), "–", "–", "–", "–", "–", "–", "–"
    yield "check", _seconds(report.check_s), ratio, "–", "–", f"{report.check_peak_mb:.0f}", "–", "–", "–"
    for name, found in report.methods.items():
        yield name, *_row(found, report.read_s, _files(report, name))


def _files(report: SpeedReport, method: str) -> float:
    """Seconds that a port by a migration can't be done in less than: its own reading, the adapter's and its writing."""
    return report.migration_read_s.get(method, 0.0) + report.adapter_s


def _row(found: MethodSpeed, read_s: float, files_s: float) -> tuple[str, ...]:
    plain = found.reference_s
    return (
        _seconds(found.cold_s),
        _times(found.cold_s, read_s),
        "–" if found.warm_s is None else _seconds(found.warm_s),
        "–" if found.warm_s is None else _times(found.warm_s, files_s),
        f"{found.peak_mb:.0f}",
        "–" if plain is None else _seconds(plain),
        "–" if plain is None else f"{_times(plain, found.cold_s)} ×",
        "–" if found.apart is None else f"{found.apart:.0e}",
    )


def _times(value: float, of: float) -> str:
    # What takes no longer than the start of the interpreter has no share.
    return f"{value / of:.1f}" if of > 0 else "–"


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def sized(report: SpeedReport) -> str:
    """How much was ported how, in a sentence."""
    size = f"{report.checkpoints_mb / 1000:.1f} GB of checkpoints"
    return f"{size}, a LoRA of rank {report.rank} on {report.modules} modules of the old base, {report.threads} threads"


def legend(report: SpeedReport) -> str:
    """What the columns are."""
    return (
        f"Seconds and memory over the interpreter with torch ({report.start_s:.1f} s, {report.start_mb:.0f} MB), "
        f"checkpoints {'not in' if report.cold else 'where they were, often in'} the page cache; median of "
        f"{report.runs}. Warm: by a saved migration, beside reading it and the adapter and writing what comes out "
        "(× files); a start varies by some tenths of a second, which is as much. Plain way: both models in memory, "
        "torch.linalg.svd of each module; timed on one module of each shape and multiplied. Of procrustes, that "
        "rotates the smaller side of each module; ours finds between near bases that there is nothing to rotate. "
        "Apart: largest relative distance between our ΔW and the plain way's."
    )


def running_line(found: RunningSpeed) -> str:
    """What methods take that run both models."""
    told = ", ".join(
        f"{name} {value:.1f} s ({_times(value, found.floor_s)} ×)" for name, value in found.seconds.items()
    )
    made = "effect once its inputs are made, stream with the drawing of its"
    return f"{found.n_inputs} inputs through both models of the demo: {found.floor_s:.1f} s; {told}; {made}"


def print_speed(report: SpeedReport, console: Console) -> None:
    """On a terminal."""
    console.print(f"{report.title}: {sized(report)}", highlight=False)
    shown = Table(box=None)
    for head in HEADS:
        shown.add_column(head, justify="left" if not head else "right")
    for row in rows(report):
        shown.add_row(*row)
    console.print(shown)
    console.print(legend(report), style="dim", highlight=False)
    if report.running is not None:
        console.print(running_line(report.running), highlight=False)
    for curve in report.curves:
        points = zip(curve.values, curve.seconds, curve.peak_mb, strict=True)
        grown = ", ".join(f"{value:g}: {seconds:.1f} s, {peak:.0f} MB" for value, seconds, peak in points)
        console.print(f"{curve.along} {grown}{line_of(curve)}")


def line_of(curve: SpeedCurve) -> str:
    """What its line says, where there is one."""
    if curve.seconds_per_gigabyte is None or curve.fit is None:
        return ""
    return f"; {curve.seconds_per_gigabyte:.2f} s a GB read (R² of the line {curve.fit:.3f})"


def markdown(report: SpeedReport) -> str:
    """As Markdown."""
    return markdown_table(HEADS, rows(report))
