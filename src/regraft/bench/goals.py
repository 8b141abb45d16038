"""What the methods were asked to reach, held against a record: each claim with its figures, reached or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from regraft.report.bench_schema import BenchPair, BenchReport, BenchRow

AUTO = "auto"
#: Recovery less the copy's that still counts as none lost.
NEAR_TOLERANCE = 0.005


@dataclass(frozen=True)
class Goal:
    """One claim.

    Attributes:
        claim: what was asked.
        held: whether it holds; None where the record has nothing to tell it by.
        figures: what it rests on.
    """

    claim: str
    held: bool | None
    figures: str


def goals(record: BenchReport) -> list[Goal]:
    """Every claim that can be told from a record."""
    return [
        _never_below_copy(record.pairs),
        _near(record.pairs),
        _mean(record.pairs, "strong", 0.15, "strong drift: auto is above the copy by at least 0.15", "versus_copy"),
        _mean(record.pairs, "pruned", 0.85, "pruned: auto recovers at least 0.85", "recovery"),
        _mean(record.pairs, "grown", 0.85, "grown: auto recovers at least 0.85", "recovery"),
        _far_refused(record.pairs),
        _far_language(record.pairs),
        _far_diffusion(record.pairs),
    ]


def stream_rows(pair: BenchPair) -> list[BenchRow]:
    """The rows of `stream`, at whatever rank."""
    return [row for row in pair.rows if row.name.split()[0] == "stream"]


def row_of(rows: Sequence[BenchRow], name: str) -> BenchRow | None:
    """A row that was scored, by name."""
    return next((row for row in rows if row.name == name and row.recovery.mean is not None), None)


def _measured(pairs: Sequence[BenchPair], expects: str | None = None) -> Iterator[tuple[BenchPair, BenchRow]]:
    for pair in pairs:
        row = row_of(pair.rows, AUTO)
        if row is not None and not row.refused and expects in (None, pair.expects):
            yield pair, row


def _never_below_copy(pairs: Sequence[BenchPair]) -> Goal:
    rows = list(_measured(pairs))
    below = [(pair, row) for pair, row in rows if row.versus_copy.high is not None and row.versus_copy.high < 0]
    figures = ", ".join(f"{pair.name} {row.versus_copy.mean:+.3f}" for pair, row in below)
    said = f"below it: {figures}" if below else f"of {len(rows)} pairs' means, none has its whole interval below"
    claim = "auto is never below the copy, beyond noise, in the mean over a pair's adapters"
    return Goal(claim, not below if rows else None, said)


def _near(pairs: Sequence[BenchPair]) -> Goal:
    rows = [(pair, row.versus_copy.mean) for pair, row in _measured(pairs, "near")]
    known = [(pair, mean) for pair, mean in rows if mean is not None]
    above = sum(mean > 0 for _, mean in known)
    figures = ", ".join(f"{pair.name} {mean:+.3f}" for pair, mean in known)
    held = all(mean >= -NEAR_TOLERANCE for _, mean in known) and 2 * above >= len(known) if known else None
    claim = (
        f"near: auto is at least at the copy, within {NEAR_TOLERANCE}, and above it on at least half of the pairs "
        "(means over a pair's adapters)"
    )
    return Goal(claim, held, figures)


def _mean(pairs: Sequence[BenchPair], expects: str, wanted: float, claim: str, figure: str) -> Goal:
    rows = [(pair, getattr(row, figure).mean) for pair, row in _measured(pairs, expects)]
    known = [(pair, value) for pair, value in rows if value is not None]
    held = all(value >= wanted for _, value in known) if known else None
    sign = "+" if figure == "versus_copy" else ""
    return Goal(claim, held, ", ".join(f"{pair.name} {value:{sign}.3f}" for pair, value in known))


def _far_refused(pairs: Sequence[BenchPair]) -> Goal:
    far = [pair for pair in pairs if pair.expects == "far"]
    checks = [(pair, adapter.check.verdict) for pair in far for adapter in pair.adapters]
    kept = sorted({pair.name for pair, verdict in checks if verdict != "refused"})
    refused = sum(verdict == "refused" for _, verdict in checks)
    said = f"{refused} of {len(checks)} adapters" + (f"; not: {', '.join(kept)}" if kept else "")
    return Goal("far: maps of weights are refused before any model is run", not kept if checks else None, said)


def _far_language(pairs: Sequence[BenchPair]) -> Goal:
    found = []
    for pair in pairs:
        if (pair.expects, pair.world) == ("far", "language"):
            shares = [
                (row.teacher_share.mean, row.name) for row in stream_rows(pair) if row.teacher_share.mean is not None
            ]
            found += [(pair, *max(shares))] if shares else []
    held = all(share >= 0.4 for _, share, _ in found) if found else None
    said = ", ".join(f"{pair.name} {share:.3f} ({name})" for pair, share, name in found)
    return Goal("far, language models: stream carries at least 0.40 of the gap to the teacher", held, said)


def _far_diffusion(pairs: Sequence[BenchPair]) -> Goal:
    said, held = [], []
    for pair in pairs:
        if (pair.expects, pair.world) != ("far", "diffusion"):
            continue
        styles, concepts = [], []
        for adapter in pair.adapters:
            teacher = next((row.extra.get("style") for row in adapter.rows if row.name == "reverted"), None)
            mine = [row.extra for row in adapter.rows if row.name.split()[0] == "stream" and "style" in row.extra]
            if teacher and mine:
                best = max(mine, key=lambda extra: min(extra["style"] / teacher / 0.9, extra["concept"] / 0.8))
                styles.append(best["style"] / teacher)
                concepts.append(best["concept"])
        if styles:
            style, concept = sum(styles) / len(styles), sum(concepts) / len(concepts)
            held.append(style >= 0.9 and concept >= 0.8)
            said.append(f"{pair.name} style {style:.2f} of the teacher's, concepts {concept:.2f}")
    claim = "far, diffusion: stream's style is at least 0.90 of the teacher's, with concepts kept at 0.80"
    return Goal(claim, all(held) if held else None, ", ".join(said))
