"""What ``regraft batch`` prints: the sum, then the worst rows and why."""

from __future__ import annotations

import re
from collections import Counter

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regraft.batch.tables import group_of
from regraft.report.batch_schema import BatchReport, BatchRow

# What a person reads; the files have every row.
_ROWS, _REASONS = 12, 5
#: Verdict or failure → word and style.
WORDS = {
    "failed": ("failed", "bold red"),
    "refused": ("refused", "red"),
    "refine": ("needs a refine", "yellow"),
    "survives": ("survives", "green"),
}


def batch_table(report: BatchReport, console: Console) -> None:
    """Print the summary, pairs, reasons and the worst rows of a batch."""
    console.print(f"[bold]{escape(report.summary)}[/]", soft_wrap=True)
    for pair in report.pairs:
        how = "fitted once" if pair.shared else "fitted for each adapter"
        note = f"; {pair.note}" if pair.note else ""
        line = f"{pair.source} → {pair.target}: {pair.rows} by {pair.method}, {how}{note}"
        console.print(f"[dim]pair[/]  {escape(line)}", soft_wrap=True)
    bad = [row for row in report.rows if group_of(row) in ("failed", "refused")]
    for reason, number in reasons(bad)[:_REASONS]:
        console.print(f"[dim]{number:>4} ×[/] {escape(reason)}", soft_wrap=True)
    worst = [row for row in report.rows if group_of(row) != "survives"][:_ROWS]
    if worst:
        table = Table(box=None, pad_edge=False)
        for title in ("adapter", "", "expected", "modules"):
            table.add_column(title)
        for row in worst:
            word, style = WORDS[group_of(row)]
            table.add_row(escape(row.name), f"[{style}]{word}[/]", expected(row), modules(row))
        console.print(table)
    seconds = max(report.seconds, 1e-9)
    console.print(
        f"[dim]{report.executor}, {report.seconds:.1f} s, {len(report.rows) / seconds:.1f} adapters a second[/]"
    )
    for name in report.tables:
        console.print(f"[dim]table[/]  {escape(name)}", soft_wrap=True)


def reasons(rows: list[BatchRow]) -> list[tuple[str, int]]:
    """Why rows failed or were refused, most frequent first; one that differs in its figures alone is told once."""
    texts = [" ".join(filter(None, (f"{row.reason.rstrip('.')}.", row.remedy))) for row in rows]
    alike: dict[str, str] = {}
    counts = Counter(alike.setdefault(re.sub(r"-?\d+\.\d+", "", text), text) for text in texts)
    return counts.most_common()


def expected(row: BatchRow) -> str:
    """The forecast share of a native adapter's gain, with its interval; empty where there is none."""
    found = row.forecast
    return "" if found is None else f"{found.recovery:.2f} ({found.low:.2f} to {found.high:.2f})"


def modules(row: BatchRow) -> str:
    """``32`` or ``30 of 32``: those that are carried."""
    if row.counts is None:
        return ""
    total = row.counts.ported + row.counts.skipped + row.counts.refused
    return str(total) if total == row.counts.ported else f"{row.counts.ported} of {total}"
