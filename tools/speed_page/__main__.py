"""The measured part of docs/speed.md, and its picture, from what ``regraft bench speed`` wrote.

``python -m tools.speed_page results/speed-sdxl.json … --page docs/speed.md --picture docs/speed.svg``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from regraft.bench.speed.table import legend, line_of, markdown, running_line, sized
from regraft.bench.table import replaced
from regraft.report.json_schema import parse
from regraft.report.speed_schema import SpeedCurve, SpeedReport

BEGIN, END = "<!-- speed: written by `python -m tools.speed_page` -->", "<!-- /speed -->"
_COLOURS = ("#2f7d5b", "#b8562f")


def section(reports: Sequence[SpeedReport], picture: str) -> str:
    """Tables and curves, as Markdown."""
    parts: list[str] = []
    for report in reports:
        sizes = ", ".join(f"{name} {size / 1000:.1f} GB" for name, size in report.migration_mb.items() if size > 100)
        parts += [f"### {report.title}", f"{sized(report)}.", markdown(report), legend(report)]
        parts += [f"Migrations: {sizes}."] if sizes else []
        parts += [f"{running_line(report.running)}."] if report.running is not None else []
        if report.curves:
            parts += [f"![seconds and memory as things grow]({picture})", *map(_told, report.curves)]
        machine = f"{report.machine['cores']} cores, {report.machine['processor']}"
        parts += [f"```\n{report.command}\n```", f"{report.date}, {machine}."]
    return "\n\n".join(parts)


def _told(curve: SpeedCurve) -> str:
    seconds = f"{curve.seconds[0]:.1f} to {curve.seconds[-1]:.1f} s"
    memory = f"{min(curve.peak_mb):.0f} to {max(curve.peak_mb):.0f} MB"
    return f"- **{curve.along}** {curve.values[0]:g} to {curve.values[-1]:g}: {seconds}, {memory}{line_of(curve)}"


def draw(curves: Sequence[SpeedCurve], path: Path) -> None:
    """Seconds and memory along each thing that grows, one panel each."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "speed"
    figure, axes = pyplot.subplots(1, len(curves), figsize=(3 * len(curves), 2.8), layout="constrained")
    for axis, curve in zip(axes, curves, strict=True):
        rank = curve.along == "rank"
        x = curve.values if rank else curve.gigabytes
        axis.plot(x, curve.seconds, "o-", color=_COLOURS[0])
        axis.set_title(f"{curve.along} {curve.values[0]:g} to {curve.values[-1]:g}", fontsize=9)
        axis.set_xlabel("rank" if rank else "GB read", fontsize=8)
        axis.set_ylim(bottom=0)
        memory = axis.twinx()
        memory.plot(x, curve.peak_mb, "s--", color=_COLOURS[1])
        memory.set_ylim(0, 1000)
        for one, name, colour in ((axis, "seconds", _COLOURS[0]), (memory, "MB", _COLOURS[1])):
            one.set_ylabel(name, fontsize=8, color=colour)
            one.tick_params(labelsize=7)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    asked = parser.parse_args()
    reports = [parse(SpeedReport, file.read_text(encoding="utf-8"), file=file) for file in asked.records]
    text = asked.page.read_text(encoding="utf-8")
    asked.page.write_text(replaced(text, BEGIN, END, section(reports, asked.picture.name)), encoding="utf-8")
    for report in reports:
        if report.curves:
            draw(report.curves, asked.picture)


if __name__ == "__main__":
    main()
