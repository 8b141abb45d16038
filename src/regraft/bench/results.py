"""The record of the whole benchmark, put together from the cells in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from regraft._version import __version__
from regraft.bench import figures
from regraft.bench.cells import Cell
from regraft.bench.controls import CONTROLS, FEW
from regraft.bench.figures import Rows
from regraft.bench.run import Target, dependence, stored
from regraft.bench.sources import source_of_check
from regraft.bench.variants import Variant
from regraft.bench.worlds import PairSpec
from regraft.output import write_text
from regraft.report.bench_schema import (
    BenchAdapter,
    BenchCheck,
    BenchGroup,
    BenchMethod,
    BenchPair,
    BenchReport,
    BenchRow,
    BenchRun,
    BenchSeed,
)
from regraft.report.json_schema import parse
from regraft.report.schema import Forecast, Forecasts, Interval

#: World → as tables call it.
WORLDS = {"language": "language models", "diffusion": "diffusion", "encoder": "real encoders"}
_PACKAGES = ("torch", "transformers", "diffusers", "peft")
_NO_GAIN = "the native adapter's own gain may be none"
_NO_TEACHER = "the old base with its LoRA is no better than the new base alone"
_NO_LEAD = "the new base is not better than the old one on these inputs"


def assemble(
    wanted: Sequence[Target],
    variants: Sequence[Variant],
    cache: Path,
    *,
    command: str,
    date: str,
    controls: Sequence[str] = tuple(CONTROLS),
) -> BenchReport:
    """The record of what lies in the cache; what is not there is left out, and counted.

    Args:
        wanted: what was asked for.
        variants: methods beside the controls.
        cache: the benchmark's folder.
        command: that a reader types to make it again.
        date: of the run.
        controls: that were measured.
    """
    rows: list[tuple[str, Variant | None]] = [(row, None) for row in controls]
    rows += [(variant.name, variant) for variant in variants]
    found: dict[str, dict[str, list[BenchSeed]]] = {}
    missing: dict[str, int] = {}
    seconds = 0.0
    for target in wanted:
        cells, check = _read(target, rows, cache)
        pair = target.spec.name
        missing[pair] = missing.get(pair, 0) + len(rows) - len(cells)
        seconds += sum((cell.seconds or 0.0) + (cell.scored_in or 0.0) for cell in cells.values())
        adapters = found.setdefault(pair, {})
        if cells:
            adapters.setdefault(target.adapter, []).append(_seed(target.seed, cells, check, rows))
    specs = {target.spec.name: target.spec for target in wanted}
    pairs = [
        _pair(specs[name], [adapter_of(adapter, seeds) for adapter, seeds in adapters.items()], missing[name])
        for name, adapters in found.items()
    ]
    run = BenchRun(
        command=command,
        date=date,
        versions=dict(_versions()),
        seconds=round(seconds),
        pairs=[pair.name for pair in pairs if pair.adapters],
    )
    return BenchReport(
        regraft_version=__version__,
        runs=[run],
        methods=[BenchMethod(name=v.name, method=v.method, options=v.asked) for v in variants],
        groups=_groups(pairs),
        pairs=pairs,
    )


def kept(record: BenchReport, earlier: BenchReport, specs: Iterable[PairSpec]) -> BenchReport:
    """A record, with what an earlier one has of pairs, adapters and seeds that it has not measured itself.

    Args:
        record: the newer one.
        earlier: its other figures are kept as they are.
        specs: the benchmark's pairs, in its order.
    """
    known = {spec.name: spec for spec in specs}
    newer, older = ({pair.name: pair for pair in one.pairs} for one in (record, earlier))
    names = [name for name in dict.fromkeys([*known, *newer, *older]) if name in newer or name in older]
    seeds = [seed for one in (record, earlier) for pair in one.pairs for a in pair.adapters for seed in seeds_of(a)]
    named = [{row.name for row in seed.rows} for seed in seeds]
    # Where one was measured with few controls, no other is said to lack them.
    beside = {name for name in CONTROLS.keys() - FEW if any(name not in names for names in named)}
    pairs, rows = [], set[str]().union(*named) - beside
    stays: dict[str, bool] = {}
    for name in names:
        if name not in newer:
            pairs.append(older[name])
            stays[name] = True
            continue
        adapters = newer[name].adapters
        if name in older:
            adapters, stays[name] = _both(newer[name], older[name])
        missing = newer[name].missing
        if name in known:
            there = {
                (adapter.name, seed.seed): sum(row.name not in beside for row in seed.rows)
                for adapter in adapters
                for seed in seeds_of(adapter)
            }
            asked = [(adapter, seed) for adapter in known[name].adapters for seed in known[name].seeds]
            missing = sum(max(0, len(rows) - there.get(one, 0)) for one in asked)
        pairs.append(_pair(newer[name], adapters, missing))
    runs = [run.model_copy(update={"pairs": [n for n in run.pairs if stays.get(n)]}) for run in earlier.runs]
    methods = {method.name: method for method in [*earlier.methods, *record.methods]}
    update = {
        "runs": [*(run for run in runs if run.pairs), *(run for run in record.runs if run.pairs)],
        "methods": list(methods.values()),
        "groups": _groups(pairs),
        "pairs": pairs,
    }
    return record.model_copy(update=update)


def _both(newer: BenchPair, older: BenchPair) -> tuple[list[BenchAdapter], bool]:
    """A pair's adapters out of two records, and whether anything of the older one is among them."""
    merged = {adapter.name: adapter for adapter in older.adapters}
    stays = bool(merged.keys() - {a.name for a in newer.adapters})
    for adapter in newer.adapters:
        mine = {seed.seed: seed for seed in seeds_of(adapter)}
        before = {seed.seed: seed for seed in seeds_of(merged[adapter.name])} if adapter.name in merged else {}
        stays |= bool(before.keys() - mine.keys())
        both = before | mine
        merged[adapter.name] = adapter_of(adapter.name, [both[seed] for seed in sorted(both)])
    return list(merged.values()), stays


def _pair(spec: PairSpec | BenchPair, adapters: list[BenchAdapter], missing: int) -> BenchPair:
    facts = {fact: getattr(spec, fact) for fact in ("name", "world", "relation", "expects", "about")}
    return BenchPair(**facts, adapters=adapters, rows=mean_rows(adapters), missing=missing)


def _read(
    target: Target, rows: Iterable[tuple[str, Variant | None]], cache: Path
) -> tuple[dict[str, Cell], BenchCheck | None]:
    shelf = stored(target, cache)
    if shelf is None:
        return {}, None
    cells = {row: cell for row, variant in rows if (cell := shelf.read(row, **dependence(row, variant))) is not None}
    return cells, shelf.read_check(source=source_of_check())


def _groups(pairs: Sequence[BenchPair]) -> list[BenchGroup]:
    groups = []
    for world, expects in dict.fromkeys((pair.world, pair.expects) for pair in pairs):
        mine = [pair for pair in pairs if (pair.world, pair.expects) == (world, expects)]
        groups.append(
            BenchGroup(
                name=f"{WORLDS.get(world, world)}, {expects}",
                world=world,
                expects=expects,
                pairs=[pair.name for pair in mine],
                rows=mean_rows([adapter for pair in mine for adapter in pair.adapters]),
            )
        )
    return groups


def _seed(
    seed: int, cells: Mapping[str, Cell], check: BenchCheck | None, rows: Sequence[tuple[str, Variant | None]]
) -> BenchSeed:
    scores = {row: cell.scores for row, cell in cells.items()}
    return BenchSeed(
        seed=seed,
        native_gain=figures.difference(scores, "native", "none"),
        teacher=figures.difference(scores, "reverted", "none"),
        home=figures.difference(scores, "reverted", "old"),
        check=_check([check or BenchCheck(verdict=None, error="not checked")]),
        rows=[_row(scores, cells[row], row, variant) for row, variant in rows if row != "old" and row in cells],
    )


def _row(scores: Rows, cell: Cell, row: str, variant: Variant | None) -> BenchRow:
    return BenchRow(
        name=row,
        kind="control" if variant is None else "method",
        recovery=figures.of_one(scores, row, figures.recovery, _NO_GAIN),
        versus_copy=figures.of_one(scores, row, figures.versus_copy, _NO_GAIN),
        teacher_share=figures.of_one(scores, row, figures.teacher_share, _NO_TEACHER),
        retention=figures.of_one(scores, row, figures.retention, _NO_LEAD),
        effect_cosine=figures.mean_of([cell.effect_cosine]),
        effect_norm_ratio=figures.mean_of([cell.effect_norm_ratio]),
        energy_kept=None if cell.energy_kept is None else round(cell.energy_kept, 4),
        extra=_means([cell.extra]),
        figures=_means([cell.figures]),
        seconds=None if cell.seconds is None else round(cell.seconds, 2),
        peak_mb=None if cell.peak_mb is None else round(cell.peak_mb, 1),
        used=cell.used if variant is not None else "",
        refused=cell.refused and variant is not None,
        errors=[cell.error] if cell.error else [],
    )


def adapter_of(name: str, seeds: Sequence[BenchSeed]) -> BenchAdapter:
    """An adapter's figures: the mean over its seeds, each counting alike."""
    return BenchAdapter(
        name=name,
        seeds=[seed.seed for seed in seeds],
        native_gain=figures.over_seeds([seed.native_gain for seed in seeds]),
        teacher=figures.over_seeds([seed.teacher for seed in seeds]),
        home=figures.over_seeds([seed.home for seed in seeds if seed.home is not None]) if seeds[0].home else None,
        check=_check([seed.check for seed in seeds]),
        rows=[_mean_row(rows, figures.over_seeds, measured=True) for rows in _by_name(seed.rows for seed in seeds)],
        by_seed=list(seeds) if len(seeds) > 1 else [],
    )


def seeds_of(adapter: BenchAdapter) -> list[BenchSeed]:
    """An adapter's seeds, each with its own figures; none where the record has their mean alone."""
    if adapter.by_seed or len(adapter.seeds) > 1:
        return adapter.by_seed
    facts = {fact: getattr(adapter, fact) for fact in ("native_gain", "teacher", "home", "check", "rows")}
    return [BenchSeed(seed=adapter.seeds[0], **facts)]


def _by_name(tables: Iterable[Sequence[BenchRow]]) -> Iterable[list[BenchRow]]:
    found: dict[str, list[BenchRow]] = {}
    for table in tables:
        for row in table:
            found.setdefault(row.name, []).append(row)
    return found.values()


def mean_rows(adapters: Sequence[BenchAdapter]) -> list[BenchRow]:
    """Every row's mean over some adapters, each counting alike."""
    over = partial(figures.over_adapters, adapters=len(adapters))
    # What methods measure on different adapters has different units.
    return [_mean_row(rows, over, measured=False) for rows in _by_name(adapter.rows for adapter in adapters)]


def _mean_row(rows: Sequence[BenchRow], over: Callable[[Sequence[Interval]], Interval], *, measured: bool) -> BenchRow:
    return BenchRow(
        name=rows[0].name,
        kind=rows[0].kind,
        recovery=over([row.recovery for row in rows]),
        versus_copy=over([row.versus_copy for row in rows]),
        teacher_share=over([row.teacher_share for row in rows]),
        retention=over([row.retention for row in rows]),
        effect_cosine=figures.mean_of([row.effect_cosine for row in rows]),
        effect_norm_ratio=figures.mean_of([row.effect_norm_ratio for row in rows]),
        energy_kept=_mean(rows, lambda row: row.energy_kept, 4),
        extra=_means([row.extra for row in rows]),
        figures=_means([row.figures for row in rows]) if measured else {},
        seconds=_mean(rows, lambda row: row.seconds, 2),
        peak_mb=_mean(rows, lambda row: row.peak_mb, 1),
        used=", ".join(sorted({name for row in rows for name in row.used.split(", ") if name})),
        refused=any(row.refused for row in rows),
        errors=sorted({error for row in rows for error in row.errors}),
    )


def _check(checks: Sequence[BenchCheck]) -> BenchCheck:
    """The mean over seeds; the verdict is the first seed's."""
    tiers = {
        tier: Forecast(**{end: round(float(np.mean([getattr(f, end) for f in known])), 4) for end in _ENDS})
        for tier in Forecasts.model_fields
        if (known := [f for check in checks if (f := getattr(check.forecast, tier)) is not None])
    }
    means = {
        name: round(float(np.mean(known)), 4)
        if (known := [v for c in checks if (v := getattr(c, name)) is not None])
        else None
        for name in ("similarity", "distance", "adapter_distance", "seconds")
    }
    return checks[0].model_copy(update={**means, "forecast": Forecasts(**tiers)})


_ENDS = ("recovery", "low", "high")


def _mean(rows: Iterable[BenchRow], value: Callable[[BenchRow], float | None], digits: int) -> float | None:
    known = [found for row in rows if (found := value(row)) is not None]
    return round(float(np.mean(known)), digits) if known else None


def _means(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: float(f"{np.mean([t[name] for t in tables if name in t]):.5g}") for name in names}


def _versions() -> Iterable[tuple[str, str]]:
    yield "regraft", __version__
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def save(record: BenchReport, file: Path) -> None:
    """Write the record for the repository: one line a row, so that a change of one shows as one."""
    versions = {"schema_version": record.schema_version}
    write_text(
        _laid_out(record.model_dump(mode="json", by_alias=True, exclude_defaults=True) | versions) + "\n",
        file,
        overwrite=True,
    )


def load(file: Path) -> BenchReport:
    """Read a record back.

    Raises:
        InputError: it is not there, or no such record.
    """
    from regraft.errors import reading

    with reading(file):
        text = file.read_text(encoding="utf-8")
    return parse(BenchReport, text, file=file)


def _laid_out(value: Any, indent: str = "") -> str:
    """JSON in which what holds rows or adapters is broken into lines, and the rest is not."""
    deeper = indent + " "
    if isinstance(value, dict) and {"rows", "pairs"} & value.keys():
        lines = [f"{deeper}{json.dumps(key)}: {_laid_out(part, deeper)}" for key, part in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"{deeper}{_laid_out(part, deeper)}" for part in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)
