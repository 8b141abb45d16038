"""The record of the whole benchmark, put together from the cells in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from regraft._version import __version__
from regraft.bench import figures
from regraft.bench.cells import Cell
from regraft.bench.controls import CONTROLS
from regraft.bench.figures import Rows
from regraft.bench.run import Target, dependence, stored
from regraft.bench.sources import source_of_check
from regraft.bench.variants import Variant
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
)
from regraft.report.json_schema import parse
from regraft.report.schema import Forecast, Forecasts

#: World → as tables call it.
WORLDS = {"language": "language models", "diffusion": "diffusion", "encoder": "real encoders"}
T = TypeVar("T")
_PACKAGES = ("torch", "transformers", "diffusers", "peft")
_NO_GAIN = "the native adapter's own gain may be none"
_NO_TEACHER = "the old base with its LoRA is no better than the new base alone"
_NO_LEAD = "the new base is not better than the old one on these inputs"


@dataclass(frozen=True)
class Seed:
    """One seed's cells by row."""

    seed: int
    cells: Mapping[str, Cell]
    check: BenchCheck | None

    @property
    def scores(self) -> Rows:
        return {row: cell.scores for row, cell in self.cells.items()}


@dataclass(frozen=True)
class Column:
    """One adapter of one pair, all its seeds."""

    target: Target
    seeds: Sequence[Seed]

    @property
    def scores(self) -> list[Rows]:
        return [seed.scores for seed in self.seeds]


def assemble(
    wanted: Sequence[Target], variants: Sequence[Variant], cache: Path, *, command: str, date: str
) -> BenchReport:
    """The record of what lies in the cache; what is not there is left out, and counted.

    Args:
        wanted: what was asked for.
        variants: methods beside the controls.
        cache: the benchmark's folder.
        command: that a reader types to make it again.
        date: of the run.
    """
    rows = [(row, None) for row in CONTROLS] + [(variant.name, variant) for variant in variants]
    columns: dict[tuple[str, str], list[Seed]] = {}
    first: dict[tuple[str, str], Target] = {}
    missing: dict[str, int] = {}
    for target in wanted:
        cells, check = _read(target, rows, cache)
        missing[target.spec.name] = missing.get(target.spec.name, 0) + len(rows) - len(cells)
        if cells:
            key = target.spec.name, target.adapter
            columns.setdefault(key, []).append(Seed(target.seed, cells, check))
            first.setdefault(key, target)
    found = [Column(first[key], sorted(seeds, key=lambda seed: seed.seed)) for key, seeds in columns.items()]
    specs = {target.spec.name: target.spec for target in wanted}
    order = {name: i for i, name in enumerate(_in_order(wanted))}
    found.sort(key=lambda c: (order[c.target.spec.name], _place(c.target.spec.adapters, c.target.adapter)))
    pairs = []
    for name in order:
        adapters = [_adapter(column, rows) for column in found if column.target.spec.name == name]
        spec = specs[name]
        facts = {fact: getattr(spec, fact) for fact in ("name", "world", "relation", "expects", "about")}
        pairs.append(BenchPair(**facts, adapters=adapters, rows=mean_rows(adapters), missing=missing[name]))
    every = [cell for column in found for seed in column.seeds for cell in seed.cells.values()]
    run = BenchRun(
        command=command,
        date=date,
        versions=dict(_versions()),
        seconds=round(sum((cell.seconds or 0.0) + (cell.scored_in or 0.0) for cell in every)),
        pairs=[pair.name for pair in pairs],
    )
    return BenchReport(
        regraft_version=__version__,
        runs=[run],
        methods=[BenchMethod(name=v.name, method=v.method, options=v.asked) for v in variants],
        groups=_groups(pairs),
        pairs=pairs,
    )


def kept(record: BenchReport, earlier: BenchReport, order: Sequence[str] = ()) -> BenchReport:
    """A record, with the pairs of an earlier one that it has not measured itself.

    Args:
        record: the newer one.
        earlier: its other pairs are kept as they are.
        order: of pairs; those that are not in it come last.
    """
    mine = {pair.name for pair in record.pairs if pair.adapters}
    left = [pair for pair in earlier.pairs if pair.name not in mine]
    measured = [pair for pair in record.pairs if pair.name not in {other.name for other in left}]
    runs = [run.model_copy(update={"pairs": [name for name in run.pairs if name not in mine]}) for run in earlier.runs]
    methods = {method.name: method for method in [*record.methods, *earlier.methods]}
    pairs = sorted([*measured, *left], key=lambda pair: _place(order, pair.name))
    update = {
        "runs": [*(run for run in runs if run.pairs), *record.runs],
        "methods": list(methods.values()),
        "groups": _groups(pairs),
        "pairs": pairs,
    }
    return record.model_copy(update=update)


def _read(
    target: Target, rows: Iterable[tuple[str, Variant | None]], cache: Path
) -> tuple[dict[str, Cell], BenchCheck | None]:
    shelf = stored(target, cache)
    if shelf is None:
        return {}, None
    cells = {row: cell for row, variant in rows if (cell := shelf.read(row, **dependence(row, variant))) is not None}
    return cells, shelf.read_check(source=source_of_check())


def _in_order(wanted: Iterable[Target]) -> list[str]:
    """Pairs by world and as the world lists them."""
    return list(dict.fromkeys(target.spec.name for target in wanted))


def _place(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


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


def _adapter(column: Column, rows: Sequence[tuple[str, Variant | None]]) -> BenchAdapter:
    return BenchAdapter(
        name=column.target.adapter,
        seeds=[seed.seed for seed in column.seeds],
        native_gain=figures.difference(column.scores, "native", "none"),
        teacher=figures.difference(column.scores, "reverted", "none"),
        check=_check([seed.check for seed in column.seeds if seed.check is not None]),
        rows=[_row(column, row, variant) for row, variant in rows if row != "old"],
    )


def _row(column: Column, row: str, variant: Variant | None) -> BenchRow:
    """A row's figures over the seeds of one adapter."""
    scores = column.scores
    cells = [seed.cells[row] for seed in column.seeds if row in seed.cells]
    each = [figures.of_one([rows], row, figures.recovery, _NO_GAIN).mean for rows in scores] if len(scores) > 1 else []
    return BenchRow(
        name=row,
        kind="control" if variant is None else "method",
        recovery=figures.of_one(scores, row, figures.recovery, _NO_GAIN),
        versus_copy=figures.of_one(scores, row, figures.versus_copy, _NO_GAIN),
        teacher_share=figures.of_one(scores, row, figures.teacher_share, _NO_TEACHER),
        retention=figures.of_one(scores, row, figures.retention, _NO_LEAD),
        effect_cosine=figures.mean_of([cell.effect_cosine for cell in cells]),
        effect_norm_ratio=figures.mean_of([cell.effect_norm_ratio for cell in cells]),
        energy_kept=_mean(cells, lambda cell: cell.energy_kept, 4),
        by_seed=each,
        extra=_means([cell.extra for cell in cells]),
        figures=_means([cell.figures for cell in cells]),
        seconds=_mean(cells, lambda cell: cell.seconds, 2),
        peak_mb=_mean(cells, lambda cell: cell.peak_mb, 1),
        used=", ".join(sorted({cell.used for cell in cells if cell.used})) if variant is not None else "",
        refused=any(cell.refused for cell in cells) and variant is not None,
        errors=sorted({cell.error for cell in cells if cell.error}),
    )


def mean_rows(adapters: Sequence[BenchAdapter]) -> list[BenchRow]:
    """Every row's mean over some adapters, each counting alike."""
    by_name: dict[str, list[BenchRow]] = {}
    for adapter in adapters:
        for row in adapter.rows:
            by_name.setdefault(row.name, []).append(row)
    return [_mean_row(rows, len(adapters)) for rows in by_name.values()]


def _mean_row(rows: Sequence[BenchRow], adapters: int) -> BenchRow:
    # What methods measure on different adapters has different units: figures are left out.
    return BenchRow(
        name=rows[0].name,
        kind=rows[0].kind,
        recovery=figures.over_adapters([row.recovery for row in rows], adapters),
        versus_copy=figures.over_adapters([row.versus_copy for row in rows], adapters),
        teacher_share=figures.over_adapters([row.teacher_share for row in rows], adapters),
        retention=figures.over_adapters([row.retention for row in rows], adapters),
        effect_cosine=figures.mean_of([row.effect_cosine for row in rows]),
        effect_norm_ratio=figures.mean_of([row.effect_norm_ratio for row in rows]),
        energy_kept=_mean(rows, lambda row: row.energy_kept, 4),
        extra=_means([row.extra for row in rows]),
        seconds=_mean(rows, lambda row: row.seconds, 2),
        peak_mb=_mean(rows, lambda row: row.peak_mb, 1),
        used=", ".join(sorted({name for row in rows for name in row.used.split(", ") if name})),
        refused=any(row.refused for row in rows),
        errors=sorted({error for row in rows for error in row.errors}),
    )


def _check(checks: Sequence[BenchCheck]) -> BenchCheck:
    """The mean over seeds; the verdict is the first seed's."""
    if not checks:
        return BenchCheck(verdict=None, error="not checked")
    tiers = {
        tier: Forecast(**{end: round(float(np.mean([getattr(f, end) for f in known])), 4) for end in _ENDS})
        for tier in ("port", "refine", "bridge")
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


def _mean(of: Iterable[T], value: Callable[[T], float | None], digits: int) -> float | None:
    known = [found for one in of if (found := value(one)) is not None]
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
