"""The record of logit arithmetic, beside the ports and the old base with its adapter."""

from __future__ import annotations

from regraft.bench.table import Written, figure, markdown, pair_part, runs_of, spread
from regraft.bench.variants import LOGITS
from regraft.report.bench_schema import BenchMethod, BenchPair, BenchReport, BenchRow

#: Where a page's generated part begins and ends.
BEGIN, END = "<!-- logits: written by `regraft bench table` -->", "<!-- /logits -->"


def of_logits(record: BenchReport) -> bool:
    """Whether a record is about logit arithmetic."""
    return any(method.method == LOGITS for method in record.methods)


def logits_page(record: BenchReport) -> str:
    """The figures as a page of their own, pair by pair."""
    parts = ["# Logit arithmetic", logits_block(record), "## Pair by pair"]
    return "\n\n".join([*parts, *(part for pair in record.pairs for part in pair_part(pair))]) + "\n"


def logits_block(record: BenchReport) -> str:
    """One table, what its columns mean, and the commands."""
    names = [method.name for method in record.methods]
    called = {method.name: _called(method) for method in record.methods}
    bridges = [method.name for method in record.methods if method.method == LOGITS]
    head = ["pair", "adapters", "seeds", *called.values(), "old + adapter", "retention: native"]
    head += [f"retention: {called[name]}" for name in bridges]
    lines = [_line(pair, names, bridges) for pair in record.pairs]
    return "\n\n".join([markdown(head, lines), _LEGEND, *runs_of(record)])


_LEGEND = (
    "Share of a native adapter's gain on held-out texts (0: the new base alone), with its 95 % interval; *old + "
    "adapter*: the old base in the new one's place. In brackets: `port` refuses it, and what is shown was forced. "
    "Retention: of what the new base does better than the old one without an adapter, the share that is left."
)


def _line(pair: BenchPair, names: list[str], bridges: list[str]) -> list[str]:
    rows = {row.name: row for row in pair.rows}
    seeds = sorted({seed for adapter in pair.adapters for seed in adapter.seeds})
    kept = [rows.get("native"), *(rows.get(name) for name in bridges)]
    return [
        f"{pair.name}, {pair.expects}",
        ", ".join(adapter.name for adapter in pair.adapters),
        ", ".join(map(str, seeds)),
        *(_share(rows.get(name)) for name in names),
        _share(rows.get("reverted")),
        *("–" if row is None else figure(row.retention) for row in kept),
    ]


def _called(method: BenchMethod) -> str:
    if method.method != LOGITS:
        return method.name
    mix = method.options.get("mix")
    return f"λ = {method.options.get('strength', 1)}" + ("" if mix is None else f", mix {mix}")


def _share(row: BenchRow | None) -> str:
    if row is None or row.recovery.mean is None:
        return "–"
    said = spread(row.recovery) if row.kind == "method" else figure(row.recovery)
    return f"({said})" if row.refused else said


WRITTEN = Written(BEGIN, END, of_logits, logits_block, logits_page)
