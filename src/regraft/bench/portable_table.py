"""The record of kinds of adapter side by side, as in the LoRA-X paper: at home, carried over, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.bench.table import Written, figure, markdown, pair_part, runs_of, spread
from regraft.bench.variants import BY_INDEX
from regraft.report.bench_schema import BenchAdapter, BenchPair, BenchReport, BenchRow

#: Where a page's generated part begins and ends.
BEGIN, END = "<!-- portable: written by `regraft bench table` -->", "<!-- /portable -->"

# As the pages call them; what stands behind the style or the text in an adapter's name.
_KINDS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "foura": "FouRA",
    "svdiff": "SVDiff",
    "lorax": "LoRA-X, all directions",
    "lorax-r8": "LoRA-X, r 8 × 8",
}
_CARRIED = ("copy", "auto", "lora-x", BY_INDEX)


def of_kinds(record: BenchReport) -> bool:
    """Whether a record is about kinds of adapter."""
    return any(method.method == BY_INDEX for method in record.methods)


def kinds_page(record: BenchReport) -> str:
    """The figures as a page of their own, pair by pair."""
    parts = [
        "# Kinds of adapter, carried over",
        kinds_block(record),
        "## Pair by pair",
        *(part for pair in record.pairs for part in pair_part(pair)),
    ]
    return "\n\n".join(parts) + "\n"


def kinds_block(record: BenchReport) -> str:
    """A table for each pair, what its columns mean, and the commands."""
    parts = []
    for pair in record.pairs:
        parts += [f"**{pair.name}** ({pair.expects}): {pair.about}.", _table(pair)]
    return "\n\n".join([*parts, _LEGEND, *runs_of(record)])


_LEGEND = (
    "*At home*: what the adapter gains on the old base. *Native*: what the same kind gains when it is trained on the "
    "new base; both in the world's unit (nats per character; nats per latent value). *Copy*, *auto*, *lora-x* "
    "(projection on the new base's singular directions), *by-index* (the same numbers on them): the share of that "
    "native gain that is recovered, with its 95 % interval for auto. Brackets: `port` refuses it, and what is shown "
    "was forced. × could not be carried. *Against LoRA*: what auto's port gains on the new base, in shares of the "
    "native LoRA's gain: what a maker ends up with. *Numbers*: trained ones. *Seconds*: processor time of auto's port. "
    "*Style*: share of the pixels on the style's palette, native → carried by auto. *Diversity*: mean distance "
    "(1 − cosine) of a classifier's features between pictures of one prompt, likewise."
)


def _table(pair: BenchPair) -> str:
    pictures = pair.world == "diffusion"
    seeds = max(len(adapter.seeds) for adapter in pair.adapters)
    # Behind a kind's name stands the number of its seeds, where it has fewer.
    head = [f"{seeds} seed{'s' * (seeds > 1)}", "numbers", "at home", "native", *_CARRIED, "against LoRA", "seconds"]
    head += ["style", "diversity"] if pictures else []
    plain = next((a for a in pair.adapters if kind_of(a.name) == "lora"), None)
    lines = []
    for adapter in _in_order(pair.adapters):
        name, *figures = _line(adapter, plain, pictures=pictures)
        fewer = f" ({len(adapter.seeds)})" if len(adapter.seeds) < seeds else ""
        lines.append([name + fewer, *figures])
    return markdown(head, lines)


def kind_of(adapter: str) -> str:
    """The kind in an adapter's name; a name without one is a LoRA's."""
    known = [kind for kind in _KINDS if adapter.endswith(f"-{kind}")]
    return max(known, key=len, default="lora")


def _in_order(adapters: Sequence[BenchAdapter]) -> list[BenchAdapter]:
    order = list(_KINDS)
    return sorted(adapters, key=lambda adapter: order.index(kind_of(adapter.name)))


def _line(adapter: BenchAdapter, plain: BenchAdapter | None, *, pictures: bool) -> list[str]:
    rows = {row.name: row for row in adapter.rows}
    auto, native = rows.get("auto"), rows.get("native")
    numbers = adapter.check.numbers
    line = [
        _KINDS[kind_of(adapter.name)],
        "–" if numbers is None else f"{numbers:,}",
        figure(adapter.home),
        figure(adapter.native_gain),
        *(_carried(rows.get(name)) for name in _CARRIED),
        _against(auto, adapter, plain),
        "–" if auto is None or auto.seconds is None else f"{auto.seconds:.0f}",
    ]
    for name in ("style", "diversity") if pictures else ():
        ends = [row.extra.get(name) if row is not None else None for row in (native, auto)]
        line.append(" → ".join("–" if end is None else f"{end:.2f}" for end in ends))
    return line


def _carried(row: BenchRow | None) -> str:
    if row is None:
        return ""
    if row.recovery.mean is None:
        return "×" if row.missing else "–"
    said = spread(row.recovery) if row.name == "auto" else figure(row.recovery)
    return f"({said})" if row.refused else said


def _against(auto: BenchRow | None, adapter: BenchAdapter, plain: BenchAdapter | None) -> str:
    mine, theirs = adapter.native_gain.mean, None if plain is None else plain.native_gain.mean
    if auto is None or auto.recovery.mean is None or mine is None or not theirs:
        return "–"
    return f"{auto.recovery.mean * mine / theirs:.2f}".replace("-", "−")


WRITTEN = Written(BEGIN, END, of_kinds, kinds_block, kinds_page)
