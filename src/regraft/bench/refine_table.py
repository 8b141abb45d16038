"""The record of `refine` as a page: shares of native and of the teacher, retention, cost, ablations and curves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import get_args

from regraft.bench.controls import CONTROLS
from regraft.bench.goals import row_of
from regraft.bench.refine_goals import refine_goals
from regraft.bench.table import Written, errors_of, figure, goal_table, markdown, pair_part, runs_of, spread
from regraft.bench.variants import REFINE
from regraft.refine.settings import Objective
from regraft.report.bench_schema import BenchAdapter, BenchPair, BenchReport, BenchRow

#: Where a page's generated part begins and ends.
BEGIN, END = "<!-- refine: written by `regraft bench table` -->", "<!-- /refine -->"

_BESIDE = ("copy", "auto")
_OBJECTIVES = get_args(Objective)
_EFFECT = "effect"
# What a curve runs over: the option, and what it is called.
_CURVES = {"steps": "steps", "n_inputs": "inputs asked for"}


def of_refine(record: BenchReport) -> bool:
    """Whether a record is about refines."""
    return any(method.method == REFINE for method in record.methods)


def refine_block(record: BenchReport) -> str:
    """The summary for a page of other text."""
    return "\n\n".join((shares(record), _legend(record), *runs_of(record)))


def refine_page(record: BenchReport) -> str:
    """docs/refine-benchmark.md, whole."""
    parts = [
        "# The benchmark of refine",
        "Made by `regraft bench table results/refine.json --markdown docs/refine-benchmark.md`. Pairs, adapters, "
        "native adapters and test inputs are those of [the benchmark of methods](benchmark.md); what *auto* ported, "
        "`refine` trained on with inputs that the bases made themselves, and no test input is among those.",
        "## What is recovered",
        refine_block(record),
        "## Goals",
        goal_table(refine_goals(record)),
        "## What it costs",
        _costs(record),
        *_ablations(record),
        "## Pair by pair",
        *(part for pair in record.pairs for part in pair_part(pair)),
    ]
    return "\n\n".join(parts) + "\n"


def shares(record: BenchReport) -> str:
    """Pairs by what is recovered of native, and of the teacher, with retention beside the native's."""
    head = ["pair", *_BESIDE, REFINE, "teacher", "of the teacher: auto", "refine", "retention: native", "refine"]
    return markdown(head, [_shares(pair) for pair in record.pairs if row_of(pair.rows, REFINE) is not None])


def _shares(pair: BenchPair) -> list[str]:
    rows = {row.name: row for row in pair.rows}
    refined, native, teacher, auto = (rows.get(name) for name in (REFINE, "native", "reverted", "auto"))
    assert refined is not None
    return [
        f"{pair.name}, {pair.expects}",
        *(figure(rows[name].recovery) if name in rows else "–" for name in _BESIDE),
        f"**{spread(refined.recovery)}**",
        figure(teacher.recovery if teacher else None),
        figure(auto.teacher_share if auto else None),
        figure(refined.teacher_share),
        figure(native.retention if native else None),
        figure(refined.retention),
    ]


def _legend(record: BenchReport) -> str:
    adapters = sum(len(pair.adapters) for pair in record.pairs)
    seeds = sorted({len(adapter.seeds) for pair in record.pairs for adapter in pair.adapters})
    each = f"{seeds[0]} seed{'s' * (seeds != [1])}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    return (
        "Share of a native adapter's gain on test inputs (0: the new base alone, 1: an adapter trained anew on the new "
        f"base with the original's data), mean over {adapters} adapters in all, {each} each, with its 95 % interval. "
        f"*Teacher*: {CONTROLS['reverted']}; its share is the ceiling of matching its outputs, unless the new base "
        "helps. Retention: of what the new base does better than the old one without an adapter, the share that is "
        "left; below 0 the adapter costs more there than the upgrade brought, as the native one does, too."
    )


def _costs(record: BenchReport) -> str:
    head = ["pair", "adapter", "start → objective", "start had", "of what is wanted", "steps", "inputs", "seconds"]
    lines = []
    for pair, adapter, row in _each(record, REFINE):
        known = row.figures
        lines.append(
            [
                pair.name,
                adapter.name,
                _way(row.used),
                f"{known.get('start_had', 0):.2f}",
                f"{known.get('of_what_is_wanted', 0):.2f}",
                f"{known.get('steps', 0):.0f} of {known.get('steps_made', 0):.0f}",
                f"{known.get('inputs', 0):.0f}",
                f"{row.seconds or 0:.0f}",
                f"{known['of_native_seconds']:.2f}" if "of_native_seconds" in known else "–",
                f"{row.peak_mb or 0:.0f}",
            ]
        )
    told = (
        "Processor time of the whole refine on one thread: start, inputs, aims and training. *Of native*: in times of "
        "what the training of the native adapter took. *Start had*, *of what is wanted*: on held-out self-made inputs. "
        "Steps: of the look that was kept, of those made. Inputs: texts, or noisy states, several of each picture."
    )
    return f"{markdown([*head, 'of native', 'MB'], lines)}\n\n{told}"


def _way(used: str) -> str:
    """Starts and objectives apart: over seeds, a row has the names of both in one list."""
    names = used.split(", ")
    objectives = [name for name in names if name in _OBJECTIVES]
    starts = [name for name in names if name not in _OBJECTIVES]
    if _EFFECT in objectives:
        # A method's name, too: beside another objective it is the start; alone it is both.
        starts.append(_EFFECT)
        objectives = [name for name in objectives if name != _EFFECT] or [_EFFECT]
    return " → ".join(", ".join(part) for part in (starts, objectives))


def _each(record: BenchReport, name: str) -> Iterator[tuple[BenchPair, BenchAdapter, BenchRow]]:
    for pair in record.pairs:
        for adapter in pair.adapters:
            row = row_of(adapter.rows, name)
            if row is not None:
                yield pair, adapter, row


def _ablations(record: BenchReport) -> Iterator[str]:
    others = [method for method in record.methods if method.method == REFINE and method.name != REFINE]
    curves = {option: [method for method in others if list(method.options) == [option]] for option in _CURVES}
    along = {method.name for methods in curves.values() for method in methods}
    rest = [method.name for method in others if method.name not in along]
    if rest:
        yield "## What its parts are worth"
        yield "Options changed on the same adapters and seeds; the first row of a pair is `refine` as it is by default."
        for pair in record.pairs:
            yield from _beside(pair, rest)
    for option, methods in curves.items():
        names = [method.name for method in sorted(methods, key=lambda m: float(m.options[option]))]
        if names:
            yield f"## By {_CURVES[option]}"
            for pair in record.pairs:
                yield from _beside(pair, names)


def _beside(pair: BenchPair, names: Sequence[str]) -> Iterator[str]:
    """A table of some variants beside the default, over those adapters and seeds alone that all of them have."""
    tables = [rows for adapter in pair.adapters for rows in _alike(adapter, (REFINE, *names))]
    known = [name for name in names if any(row_of(rows, name) for rows in tables)]
    if not known:
        return
    lines = [_variant(name, [row for rows in tables if (row := row_of(rows, name))]) for name in (REFINE, *known)]
    head = [pair.name, "of native", "of the teacher", "retention", "of what is wanted", "seconds"]
    yield markdown(head, lines)
    errors = [
        f"- {row.name}: {'; '.join(errors_of(pair, row))}" for row in pair.rows if row.name in names and row.errors
    ]
    if errors:
        yield "\n".join(errors)


def _alike(adapter: BenchAdapter, names: Sequence[str]) -> list[list[BenchRow]]:
    """An adapter's rows, seed by seed, of those that all of these variants were measured on, as far as any was."""
    tables = [seed.rows for seed in adapter.by_seed] or [adapter.rows]
    asked = [name for name in names if any(row_of(rows, name) for rows in tables)]
    if len(asked) < 2:
        return []
    return [rows for rows in tables if all(row_of(rows, name) for name in asked)]


def _variant(name: str, rows: Sequence[BenchRow]) -> list[str]:
    def mean(values: Iterable[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.3f}".replace("-", "−") if known else "–"

    return [
        re.sub(rf"^{REFINE} ", "", name),
        mean(row.recovery.mean for row in rows),
        mean(row.teacher_share.mean for row in rows),
        mean(row.retention.mean for row in rows),
        mean(row.figures.get("of_what_is_wanted") for row in rows),
        mean(row.seconds for row in rows).split(".")[0],
    ]


WRITTEN = Written(BEGIN, END, of_refine, refine_block, refine_page)
