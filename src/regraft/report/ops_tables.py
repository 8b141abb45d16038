"""The terminal views of the records of `ops_schema`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regraft.report.ops_schema import ConvertReport, DiffReport, ExtractReport, MergeReport, ResizeReport

#: Rows of a table: what a person reads; ``--json`` has every module.
ROW_LIMIT = 24
#: Header entries that are named.
ENTRY_LIMIT = 8


def convert_table(report: ConvertReport, console: Console) -> None:
    """What was written, and what became of the modules that could not be kept as they are."""
    planned = "  (plan: nothing was written)" if report.dry_run else ""
    line = f"{escape(report.output)}  {report.format}, {report.modules} modules{planned}"
    console.print(line, soft_wrap=True)
    rows = [
        (
            row.name,
            f"{row.kind} → {row.becomes or 'lost'}",
            _ranks(row.rank_in, row.rank_out),
            _share(row.energy_kept),
            row.reason,
        )
        for row in report.changes
    ]
    _table(console, ("module", "kind", "rank", "kept", ""), rows)
    _notes(console, report.notes)
    if report.removed:
        console.print(f"Taken out: {escape(', '.join(report.removed))}", soft_wrap=True)


def resize_table(report: ResizeReport, console: Console) -> None:
    """What was written, and each module's rank and share."""
    console.print(f"{_files(report.outputs)}  {report.format}, {report.energy_kept:.2%} of ‖ΔW‖² kept", soft_wrap=True)
    rows = [
        (row.name, row.kind, _ranks(row.rank_in, row.rank_out), _share(row.energy_kept), row.reason)
        for row in report.modules
    ]
    _table(console, ("module", "kind", "rank", "kept", ""), rows)
    _notes(console, report.notes)


def merge_table(report: MergeReport, console: Console) -> None:
    """What was written, and how each module was put together."""
    console.print(f"{_files(report.outputs)}  {report.format}, {len(report.modules)} modules", soft_wrap=True)
    for number, (name, weight) in enumerate(zip(report.inputs, report.weights, strict=True)):
        console.print(f"  {number}  {weight:g} · {escape(name)}", soft_wrap=True)
    rows = [
        (
            row.name,
            "+".join(map(str, row.inputs)),
            row.how,
            _ranks("+".join(_rank(rank) for rank in row.rank_in), row.rank_out),
            _share(row.energy_kept),
        )
        for row in report.modules
    ]
    _table(console, ("module", "of", "how", "rank", "kept"), rows)
    _notes(console, report.notes)


def extract_table(report: ExtractReport, console: Console) -> None:
    """What was written, and what of either checkpoint it holds; the largest changes first."""
    held = sum(row.kind is not None for row in report.modules)
    head = f"{held} changed parameters, {report.unchanged} unchanged, {report.energy_kept:.2%} of ‖ΔW‖² kept"
    console.print(f"{_files(report.outputs)}  {report.format}, {head}", soft_wrap=True)
    ordered = sorted(report.modules, key=lambda row: (row.kind is not None, -(row.change or 0.0)))
    rows = [
        (row.name, row.kind or "left out", _rank(row.rank), _share(row.energy_kept), _share(row.change), row.reason)
        for row in ordered
    ]
    _table(console, ("parameter", "kind", "rank", "kept", "change", ""), rows)
    _notes(console, report.notes)


def diff_table(report: DiffReport, console: Console) -> None:
    """Two adapters: the whole, then what differs most."""
    for name, format, family, norm in zip(
        (report.first, report.second), report.formats, report.families, report.norms, strict=True
    ):
        console.print(f"{escape(name)}  {format}, {family or 'family unknown'}, ‖ΔW‖ {norm:.4g}", soft_wrap=True)
    both = len(report.modules)
    cosine = f", cosine {report.cosine:.4f}" if report.cosine is not None else ""
    console.print(f"distance {report.distance:.4g}{cosine}; {both} modules in both, {report.equal} of them equal")
    for name, only in ((report.first, report.only_first), (report.second, report.only_second)):
        if only:
            some = ", ".join(only[:3]) + (", …" if len(only) > 3 else "")
            console.print(f"only in {escape(name)}: {len(only)} ({escape(some)})", soft_wrap=True)
    if report.metadata:
        count = len(report.metadata)
        some = ", ".join(list(report.metadata)[:ENTRY_LIMIT]) + (f", … ({count} in all)" if count > ENTRY_LIMIT else "")
        console.print(f"header entries that differ: {escape(some)}", soft_wrap=True)
    rows = [
        (
            row.name,
            _both(*row.kinds),
            _both(*map(_rank, row.ranks)),
            _both(*map(_number, row.norms)),
            _number(row.cosine),
            "equal" if row.equal else _number(row.distance),
            row.reason,
        )
        for row in report.modules
    ]
    _table(console, ("module", "kind", "rank", "‖ΔW‖", "cosine", "distance", ""), rows)


def _table(console: Console, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    rows = list(rows)
    if not rows:
        return
    # A column that says nothing is left out.
    kept = [i for i in range(len(titles)) if any(row[i] not in ("", "–") for row in rows)]
    table = Table(box=None, pad_edge=False)
    for i in kept:
        table.add_column(titles[i], overflow="fold")
    for row in rows[:ROW_LIMIT]:
        table.add_row(*(escape(row[i]) for i in kept))
    console.print()
    console.print(table)
    if len(rows) > ROW_LIMIT:
        console.print(f"… and {len(rows) - ROW_LIMIT} more: see --json")


def _notes(console: Console, notes: Iterable[str]) -> None:
    for note in notes:
        console.print(escape(note), soft_wrap=True)


def _files(files: Sequence[str]) -> str:
    return escape(files[0]) if files else "nothing written"


def _rank(rank: int | None) -> str:
    return "–" if rank is None else str(rank)


def _ranks(before: int | str | None, after: int | None) -> str:
    old, new = ("–" if rank is None else str(rank) for rank in (before, after))
    return old if old == new or new == "–" else f"{old} → {new}"


def _both(one: str | None, two: str | None) -> str:
    return str(one) if one == two else f"{one}, {two}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"
