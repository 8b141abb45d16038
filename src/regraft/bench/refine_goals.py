"""What `refine` was asked to reach, held against a record: each claim with its figures, reached or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from regraft.bench.goals import Goal, row_of
from regraft.bench.variants import REFINE
from regraft.refine.pictures import LEVELS
from regraft.report.bench_schema import BenchPair, BenchReport, BenchRow

#: Of a native adapter's training, what a refine may cost; and the texts or pictures that a near pair may take.
COST, INPUTS = 0.25, 300
# Of the native adapter's retention, what is to be left.
_KEPT = 0.95


def refine_goals(record: BenchReport) -> list[Goal]:
    """Every claim that can be told from a record with rows of `refine` as it is by default."""
    pairs = record.pairs
    language = [pair for pair in pairs if pair.world == "language"]
    diffusion = [pair for pair in pairs if pair.world == "diffusion"]
    strong = [pair for pair in language if pair.expects == "strong" and pair.relation != "tokenizer"]
    return [
        _of_native(0.97, "near, language models", [pair for pair in language if pair.expects == "near"]),
        _above_teacher(strong),
        _of_native(0.85, "strong drift, language models: its first adapter", strong, first=True),
        _of_native(0.95, "near, diffusion", [pair for pair in diffusion if pair.expects == "near"]),
        _of_native(0.92, "pruned and grown", [pair for pair in pairs if pair.expects in ("pruned", "grown")]),
        _far([pair for pair in pairs if pair.expects == "far"]),
        _of_native(0.70, "another tokenizer", [pair for pair in language if pair.relation == "tokenizer"]),
        _retention(pairs),
        _cost(pairs),
        _inputs([pair for pair in pairs if pair.expects == "near"]),
    ]


def _refined(pairs: Sequence[BenchPair]) -> Iterator[tuple[BenchPair, BenchRow]]:
    for pair in pairs:
        row = row_of(pair.rows, REFINE)
        if row is not None:
            yield pair, row


def _all(claim: str, found: Sequence[tuple[str, bool]]) -> Goal:
    held = all(ok for _, ok in found) if found else None
    return Goal(claim, held, ", ".join(said for said, _ in found))


def _of_native(wanted: float, which: str, pairs: Sequence[BenchPair], *, first: bool = False) -> Goal:
    found = []
    for pair in pairs:
        row = row_of(pair.adapters[0].rows if first and pair.adapters else pair.rows, REFINE)
        if row is not None and row.recovery.mean is not None:
            called = f"{pair.name} {pair.adapters[0].name}" if first else pair.name
            found.append((f"{called} {row.recovery.mean:.3f}", row.recovery.mean >= wanted))
    return _all(f"{which}: at least {wanted} of native", found)


def _above_teacher(pairs: Sequence[BenchPair]) -> Goal:
    found = []
    for pair, row in _refined(pairs):
        teacher = row_of(pair.rows, "reverted")
        mean = row.recovery.mean
        if teacher is not None and teacher.recovery.mean is not None and mean is not None:
            said = f"{pair.name} {mean:.3f} (teacher {teacher.recovery.mean:.3f})"
            found.append((said, mean > teacher.recovery.mean))
    return _all("strong drift, language models: above the teacher's share of native", found)


def _far(pairs: Sequence[BenchPair]) -> Goal:
    found = []
    for pair, row in _refined(pairs):
        teacher = row_of(pair.rows, "reverted")
        mean, share = row.recovery.mean, row.teacher_share.mean
        assert mean is not None
        lower = teacher is not None and teacher.recovery.mean is not None and teacher.recovery.mean < 0.8
        held = mean >= 0.8 or (lower and share is not None and share >= 0.95)
        said = f"{pair.name} {mean:.3f}" + (f" ({share:.3f} of the teacher's)" if share is not None else "")
        found.append((said, held))
    return _all("far: at least 0.80 of native, or 0.95 of the teacher's share where that is lower", found)


def _retention(pairs: Sequence[BenchPair]) -> Goal:
    found = []
    for pair, row in _refined(pairs):
        native = row_of(pair.rows, "native")
        if native is None or native.retention.mean is None or row.retention.mean is None:
            continue
        # Below 0 the native adapter costs more than the upgrade brought: it may not cost a twentieth more than that.
        least = native.retention.mean - (1 - _KEPT) * abs(native.retention.mean)
        said = f"{pair.name} {row.retention.mean:.2f} (native {native.retention.mean:.2f})"
        found.append((said, row.retention.mean >= least))
    return _all(f"retention: at least {_KEPT} of what the native adapter keeps", found)


def _cost(pairs: Sequence[BenchPair]) -> Goal:
    found = []
    for pair in pairs:
        rows = [row for adapter in pair.adapters if (row := row_of(adapter.rows, REFINE)) is not None]
        shares = [row.figures["of_native_seconds"] for row in rows if "of_native_seconds" in row.figures]
        if shares:
            share = sum(shares) / len(shares)
            found.append((f"{pair.name} {share:.2f}", share <= COST))
    return _all(f"cost: at most {COST} of native training's time, inputs and start counted", found)


def _inputs(pairs: Sequence[BenchPair]) -> Goal:
    found = []
    for pair in pairs:
        rows = [row for adapter in pair.adapters if (row := row_of(adapter.rows, REFINE)) is not None]
        if rows:
            # A picture is read under several levels of noise, each of them an input.
            of_each = LEVELS if pair.world == "diffusion" else 1
            most = max(row.figures.get("inputs", 0.0) for row in rows) / of_each
            found.append((f"{pair.name} {most:.0f}", most < INPUTS))
    return _all(f"near: fewer than {INPUTS} texts or pictures made", found)
