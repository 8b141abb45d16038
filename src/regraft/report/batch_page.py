"""The results of a batch as one self-contained HTML page: no script, nothing loaded from anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.batch.tables import group_of
from regraft.report.batch_schema import BatchReport, BatchRow
from regraft.report.batch_table import expected, modules, reasons
from regraft.report.html import BAD, GOOD, WARN, environment
from regraft.report.public import without_folders

# Beyond so many rows a page is no longer read, and browsers get slow.
_MOST = 2000


@dataclass(frozen=True)
class Group:
    """Rows of one fate.

    Attributes:
        name, title, tone, icon: of the fate.
        rows: the first of them.
        total: how many there are.
        reasons: of failures and refusals, with their numbers.
    """

    name: str
    title: str
    tone: str
    icon: str
    rows: list[BatchRow]
    total: int
    reasons: list[tuple[str, int]]


_GROUPS = (
    ("failed", "Failed", BAD),
    ("refused", "Refused", BAD),
    ("refine", "Need a refine", WARN),
    ("survives", "Survive", GOOD),
)


def render_batch(record: BatchReport) -> str:
    """The page of a batch, worst rows first."""
    # Rows are shown by their names in the library, which have no folders of this machine.
    shown = without_folders(record.model_copy(update={"rows": []}))
    ends = {
        (pair.source, pair.target): f"{short.source} → {short.target}"
        for pair, short in zip(record.pairs, shown.pairs, strict=True)
    }
    return (
        environment()
        .get_template("batch.html")
        .render(
            record=shown,
            groups=groups_of(record),
            ends=ends,
            expected=expected,
            modules_of=modules,
            several=len(ends) > 1,
        )
    )


def groups_of(record: BatchReport) -> list[Group]:
    """The rows by what became of them, worst group first."""
    groups = []
    for name, title, (tone, icon) in _GROUPS:
        rows = [row for row in record.rows if group_of(row) == name]
        why = reasons(rows) if name in ("failed", "refused") else []
        groups.append(Group(name, title, tone, icon, rows[:_MOST], len(rows), why))
    return groups
