"""Rows from the benchmark: recoveries from its record, figures from the bases and adapters in its cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from regraft.adapter import MODEL
from regraft.base import open_base
from regraft.bench.run import WORLDS, open_world
from regraft.bench.worlds import World
from regraft.forecast.features import features
from regraft.forecast.rows import Row, over_seeds
from regraft.formats import load_adapter
from regraft.methods import methods
from regraft.port import fit_for
from regraft.prepare import prepare
from regraft.report.bench_schema import BenchAdapter, BenchReport


def rows_of_bench(record: Path, cache: Path) -> Iterator[Row]:
    """One row for each pair and adapter, means over seeds.

    Args:
        record: ``results/bench.json``.
        cache: the benchmark's folder; figures that were measured before are kept there.
    """
    report = BenchReport.model_validate_json(record.read_bytes())
    for pair in report.pairs:
        world = open_world(WORLDS[pair.world], cache)
        for adapter in pair.adapters:
            seeds = [
                Row(pair.name, adapter.name, seed, figures_of(world, cache, pair.name, adapter.name, seed), {})
                for seed in adapter.seeds
            ]
            mean = over_seeds(seeds)[0]
            yield Row(
                pair.name,
                adapter.name,
                mean.seed,
                {**mean.figures, **effect(adapter)},
                recoveries(adapter, unrelated=pair.expects == "far"),
            )


def recoveries(adapter: BenchAdapter, *, unrelated: bool) -> dict[str, float]:
    """Method as it is by default → recovery.

    What can't be carried between unrelated bases recovers nothing; elsewhere sizes alone are the reason.
    """
    rows = [row for row in adapter.rows if row.name in methods()]
    found = {row.name: row.recovery.mean for row in rows if row.recovery.mean is not None}
    return found | ({row.name: 0.0 for row in rows if row.missing} if unrelated else {})


def effect(adapter: BenchAdapter) -> dict[str, float]:
    """What the third stage sees of a copy: its effect's cosine was measured on self-made inputs, too."""
    copy = next((row for row in adapter.rows if row.name == "copy"), None)
    cosine = copy.effect_cosine.mean if copy is not None and copy.effect_cosine is not None else None
    return {} if cosine is None else {"effect moved": 1 - max(0.0, cosine)}


def figures_of(world: World, cache: Path, pair: str, adapter: str, seed: int) -> Mapping[str, float]:
    """The figures of `check` for one adapter; measured once."""
    file = cache / "forecast" / f"{pair}-{adapter}-s{seed}.json"
    if file.exists():
        found: dict[str, float] = json.loads(file.read_bytes())
        return found
    old, new = (open_base(world.base(pair, which)) for which in ("old", "new"))
    names = {component: tuple(old.modules(component)) for component in old.components}
    loaded = load_adapter(world.adapter(pair, adapter, seed), names=names, base_config=old.configs.get(MODEL))
    migration = fit_for(loaded, old, new, "auto")
    found = features(prepare(loaded, migration, old=old, new=new).evidence)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    os.replace(part, file)
    return found
