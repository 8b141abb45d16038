"""One pair, adapter and seed: bases, adapters and models, held while every row is measured on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.adapter import MODEL, Adapter
from regraft.base import Base, open_base
from regraft.bench.by_index import by_index
from regraft.bench.cells import Cell
from regraft.bench.controls import STRENGTHS, crossed, empty_like
from regraft.bench.cost import Cost
from regraft.bench.variants import BY_INDEX, LOGITS, REFINE, Variant
from regraft.bench.worlds import PairSpec, Scorer, Scores, Which, World
from regraft.carry import Settings
from regraft.check import check
from regraft.content import content_of
from regraft.errors import InputError, RegraftError
from regraft.formats import load_adapter
from regraft.port import PortResult, port
from regraft.probes import Probe, make_probe
from regraft.probes.controls import random_like
from regraft.probes.effects import compare, interval
from regraft.report.bench_schema import BenchCheck
from regraft.report.schema import CheckReport, Interval
from regraft.runtime import Loaded, applied, load_model, quiet_libraries

#: Inputs that effects are compared on, where a world says nothing else.
N_PROBE = 16


@dataclass(eq=False)
class Group:
    """What all rows of one pair, adapter and seed share, each part loaded on first use.

    Attributes:
        world: that trains, loads and scores.
        spec: the pair.
        name: of the adapter.
        seed: that it was trained with, and of all that is drawn here.
    """

    world: World
    spec: PairSpec
    name: str
    seed: int

    def __post_init__(self) -> None:
        self._open = ExitStack()
        self._known: dict[str, Scores] = {}
        self._effects: dict[str, tuple[Interval, Interval]] = {}

    def close(self) -> None:
        """Let go of the models."""
        self._open.close()

    @cached_property
    def old(self) -> Base:
        return open_base(self.world.base(self.spec.name, "old"))

    @cached_property
    def new(self) -> Base:
        return open_base(self.world.base(self.spec.name, "new"))

    @cached_property
    def trained(self) -> Path:
        return self.world.adapter(self.spec.name, self.name, self.seed)

    @cached_property
    def native(self) -> Path:
        return self.world.native(self.spec.name, self.name, self.seed)

    @cached_property
    def adapter(self) -> Adapter:
        return _loaded(self.trained, self.old)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return self.world.inputs(self.spec.name)

    @cached_property
    def on_old(self) -> Scorer:
        return self._open.enter_context(self.world.scorer(self.spec.name, "old", self.name))

    @cached_property
    def on_new(self) -> Scorer:
        return self._open.enter_context(self.world.scorer(self.spec.name, "new", self.name))

    def model(self, which: Which) -> Loaded:
        """A base as a model; a world of models that no library knows loads them itself."""
        own: Callable[[str, Which], Loaded] | None = getattr(self.world, "loaded", None)
        if own is not None:
            return own(self.spec.name, which)
        return load_model(self.world.base(self.spec.name, which))

    @cached_property
    def effects(self) -> Effects | str:
        """The original's effect on the old base, or why it can't be compared."""
        old, new = self.model("old"), self.model("new")
        own: Callable[[str, int], Probe | None] | None = getattr(self.world, "probe", None)
        try:
            probe = own(self.spec.name, self.seed) if own is not None else None
            if probe is None:
                prompts, n_inputs = self.inputs.get("prompts"), self.inputs.get("n_inputs", N_PROBE)
                probe = make_probe(old, self.adapter, prompts=prompts, n_inputs=n_inputs, seed=self.seed)
            return Effects.of(old, new, self.adapter, probe, self.seed)
        except RegraftError as error:
            return str(error)

    def ported(self, variant: Variant, strength: float = 1.0) -> PortResult:
        """The adapter by a method, forced where it is refused."""
        settings: dict[str, Any] = {"force": True, "allow_partial": True, "rank": variant.rank, "strength": strength}
        if any(field.name == "running" for field in fields(Settings)):
            known = {key: value for key, value in self.inputs.items() if key in ("prompts", "config")}
            if "prompts" in known:
                known["prompts"] = tuple(known["prompts"])
            running = import_module("regraft.methods.task").Running
            settings["running"] = running(n_inputs=variant.n_inputs, seed=self.seed, **known)
        return port(
            self.adapter, self.old, self.new, variant.method, settings=Settings(**settings), **dict(variant.options)
        )

    @cached_property
    def copied(self) -> Adapter | None:
        """The plain copy; None where nothing fits."""
        try:
            return self.ported(Variant("copy", "copy")).adapter
        except InputError:
            return None

    def method(self, variant: Variant) -> Cell:
        """One method's row."""
        if variant.method == REFINE:
            from regraft.bench.refined import refined

            return self._measured(*refined(self, variant))
        if variant.method == BY_INDEX:
            return self._measured(Cell(row=variant.name, used=BY_INDEX), by_index(self.adapter))
        if variant.method == LOGITS:
            from regraft.bench.bridged import bridged

            models = self.model("old"), self.model("new")
            return bridged(self.world, self.spec.name, self.name, self.adapter, models, variant)
        with Cost() as cost:
            result = self.ported(variant)
        report = result.report
        cell = Cell(
            row=variant.name,
            seconds=round(cost.seconds, 2),
            peak_mb=cost.added_mb,
            used=report.method,
            refused=report.verdict == "refused",
            energy_kept=_energy(result),
            figures={name: float(f"{value:.5g}") for name, value in getattr(report, "figures", {}).items()},
        )
        return self._measured(cell, result.adapter)

    def control(self, row: str) -> Cell:
        """One control's row."""
        cell = Cell(row=row)
        if row in ("none", "old"):
            return self._scored(cell, self.on_new if row == "none" else self.on_old, None)
        if row == "reverted":
            return self._scored(cell, self.on_old, self.adapter)
        if row == "native":
            return self._measured(cell, _loaded(self.native, self.new))
        if row == "empty":
            return self._scored(cell, self.on_new, empty_like(self.adapter))
        if row == "copy":
            return self.method(Variant("copy", "copy"))
        if row == "best copy":
            return self._best_copy(cell)
        assert row == "random", row
        like = self.copied or _loaded(self.native, self.new)
        return self._measured(cell, random_like(self.model("new").components, like, self.seed))

    def checked(self) -> BenchCheck:
        """What `check` says."""
        started = time.process_time()
        record = check(self.adapter, self.old, self.new)
        return BenchCheck(
            verdict=record.verdict,
            summary=record.summary,
            similarity=record.similarity,
            distance=record.distance,
            adapter_distance=_adapter_distance(record),
            forecast=record.forecast,
            numbers=_numbers(self.adapter),
            seconds=round(time.process_time() - started, 2),
        )

    def _best_copy(self, cell: Cell) -> Cell:
        found: dict[float, Scores] = {}
        for strength in STRENGTHS:
            try:
                found[strength], _ = self._scores(self.ported(Variant("copy", "copy"), strength).adapter)
            except RegraftError:
                # Some kinds can't be written at a part of their strength.
                if strength == 1.0:
                    raise
        scores, figures = crossed(found)
        return cell.model_copy(update={"figures": figures, "used": "copy"}).scored(scores)

    def _measured(self, cell: Cell, adapter: Adapter) -> Cell:
        """Scores and effects of an adapter on the new base."""
        scores, seconds = self._scores(adapter)
        cell = cell.scored(scores).model_copy(update={"scored_in": seconds})
        if isinstance(self.effects, str):
            null = Interval(mean=None, low=None, high=None, reason=self.effects)
            return cell.model_copy(update={"effect_cosine": null})
        same = content_of(adapter)
        if same not in self._effects:
            self._effects[same] = self.effects.beside(adapter)
        cosine, ratio = map(_short, self._effects[same])
        return cell.model_copy(update={"effect_cosine": cosine, "effect_norm_ratio": ratio})

    def _scores(self, adapter: Adapter) -> tuple[Scores, float]:
        """Scores on the new base, and the processor time that they took: none where they are known already."""
        started, same = time.process_time(), content_of(adapter)
        if same not in self._known:
            self._known[same] = _finite(self.on_new(adapter))
        return self._known[same], round(time.process_time() - started, 2)

    def _scored(self, cell: Cell, scorer: Scorer, adapter: Adapter | None) -> Cell:
        started = time.process_time()
        scores = _finite(scorer(adapter))
        return cell.scored(scores).model_copy(update={"scored_in": round(time.process_time() - started, 2)})


def _finite(scores: Scores) -> Scores:
    if not (np.isfinite(scores.task).all() and np.isfinite(scores.retention).all()):
        raise InputError("a score is NaN or Inf")
    return scores


@dataclass(frozen=True)
class Effects:
    """What the original does to the old base's outputs, to hold others' effects on the new base against."""

    before: list[tuple[Tensor, Tensor]]
    base: list[Tensor]
    probe: Probe
    model: Loaded
    mismatch: str | None
    seed: int

    @classmethod
    def of(cls, old: Loaded, new: Loaded, adapter: Adapter, probe: Probe, seed: int) -> Effects:
        """Run the old base with and without the adapter, and the new base without."""
        with torch.no_grad(), quiet_libraries():
            without = list(probe.outputs(old))
            with applied(old.components, adapter):
                before = list(zip(without, probe.outputs(old), strict=True))
            carried, mismatch = probe.carried_to(new)
            base = list(carried.outputs(new))
        if mismatch is None and base[0].shape != without[0].shape:
            mismatch = "the outputs have different shapes"
        return cls(before, base, carried, new, mismatch, seed)

    def beside(self, adapter: Adapter) -> tuple[Interval, Interval]:
        """Effect cosine and norm ratio of an adapter on the new base."""
        with torch.no_grad(), quiet_libraries(), applied(self.model.components, adapter):
            found = [
                compare(pair, (base, output), comparable=self.mismatch is None, logits=self.probe.logits)
                for pair, base, output in zip(self.before, self.base, self.probe.outputs(self.model), strict=True)
            ]
        cosine = interval([f.cosine for f in found], seed=self.seed, undefined=self.mismatch or "no effect")
        return cosine, interval([f.ratio for f in found], seed=self.seed, undefined="no effect", note=self.mismatch)


@contextmanager
def group_of(world: World, spec: PairSpec, name: str, seed: int) -> Iterator[Group]:
    """A group whose models are let go of at the end."""
    group = Group(world, spec, name, seed)
    try:
        yield group
    finally:
        group.close()


def _loaded(path: Path, base: Base) -> Adapter:
    names = {component: tuple(base.modules(component)) for component in base.components}
    return load_adapter(path, names=names, base_config=base.configs.get(MODEL))


def _energy(result: PortResult) -> float | None:
    rows = [(row.share or 0.0, row.energy_kept) for row in result.report.modules if row.energy_kept is not None]
    total = sum(share for share, _ in rows)
    return round(sum(share * kept for share, kept in rows) / total, 4) if total > 0 else None


# What a file holds beside the trained numbers: prints and marks of the base, fixed gates, directions, strengths.
_UNTRAINED = frozenset({"stamp", "marks", "mask", "alpha", "u", "v"})


def _numbers(adapter: Adapter) -> int:
    return sum(
        prod(ref.shape)
        for update in adapter.updates.values()
        for role, ref in update.parts().items()
        if role not in _UNTRAINED
    )


def _adapter_distance(record: CheckReport) -> float | None:
    rows = [(row.share, row.adapter_distance) for row in record.modules if row.share and row.adapter_distance]
    total = sum(share for share, _ in rows)
    return round(sum(share * distance for share, distance in rows) / total, 4) if total else None


def _short(value: Interval) -> Interval:
    ends = {end: round(v, 4) for end in ("mean", "low", "high") if (v := getattr(value, end)) is not None}
    return value.model_copy(update=ends)
