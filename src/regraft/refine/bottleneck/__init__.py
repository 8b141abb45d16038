"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2020), in the layout of AdapterHub's `adapters` library.

A bottleneck is a small network behind a block's attention or feed-forward: h ← U f(D h) + h. It changes no weight, so
nothing is ported: D and U start as they are, or through the map that the shared tokens' embeddings show where the width
is another, and the rest is distilled. `files` reads and writes the library's folders, `layers` is the forward, `places`
says where in a model it sits, `starting` makes the first state for the new base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from regraft.adapter import Adapter
from regraft.base import Base
from regraft.lineage import KEY, with_port
from regraft.output import write_whole
from regraft.probes.batches import AtWork
from regraft.refine.bottleneck.files import Bottlenecks, check_base, is_bottleneck, load_bottlenecks, written
from regraft.refine.bottleneck.layers import placed
from regraft.refine.bottleneck.places import Spot
from regraft.refine.bottleneck.starting import First, first_state
from regraft.refine.loop import Heard
from regraft.refine.settings import RefineSettings
from regraft.refine.starting import refine_entry
from regraft.refine.teacher import Teacher
from regraft.refine.told import lineage_entry
from regraft.refine.unported import Started, Tick, taught
from regraft.report.refine_schema import RefineReport
from regraft.runtime.both import BothModels
from regraft.runtime.load import Loaded

__all__ = ["BottleneckResult", "Bottlenecks", "is_bottleneck", "load_bottlenecks", "refine_bottlenecks"]


@dataclass(frozen=True)
class BottleneckResult:
    """The refined bottlenecks, and what they came to."""

    bottlenecks: Bottlenecks
    report: RefineReport

    def save(self, path: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write the library's folder, whole or not at all; see `Adapter.save`."""
        source = self.bottlenecks.path
        return write_whole(written(self.bottlenecks), Path(path), overwrite=overwrite, source=source)


def refine_bottlenecks(
    bottlenecks: Bottlenecks,
    old: Base,
    new: Base,
    *,
    settings: RefineSettings = RefineSettings(),
    state: Path | None = None,
    heard: Heard = lambda look: None,
    tick: Tick = lambda done, total, what: None,
) -> BottleneckResult:
    """Distil *old base + bottlenecks* into *new base + bottlenecks*; see `regraft.refine.unported.taught`.

    Raises:
        UsageError: ``settings`` ask for a rank or targets.
        InputError: a base is of a kind that bottlenecks aren't placed in, they don't fit the old one, or they have no
            effect.
    """
    course = _Course(bottlenecks)
    report = taught(course, old, new, settings, state=state, heard=heard, tick=tick)
    entry = {**refine_entry(old, new), "refined": lineage_entry(report)}
    known = Adapter({}, "adapterhub", metadata=bottlenecks.metadata, path=bottlenecks.path)
    first = course.first
    config = {**first.config, KEY: json.loads(with_port(known, entry)[KEY])}
    tables = {spot: module.state_dict() for spot, module in first.modules.items()}
    return BottleneckResult(replace(first.like, config=config, tables=tables), report)


class _Course:
    """Bottlenecks as `taught` takes them."""

    noun, retains = "bottleneck adapter", True

    def __init__(self, bottlenecks: Bottlenecks) -> None:
        self.bottlenecks = bottlenecks
        self.path, self.digest = bottlenecks.path, bottlenecks.digest
        self._first: First | None = None

    @property
    def first(self) -> First:
        assert self._first is not None
        return self._first

    def teacher(self, models: BothModels) -> Teacher:
        check_base(self.bottlenecks, models.old)
        return Teacher(_in_place(models.old, self.bottlenecks.modules()), self.path)

    def start(self, old: Base, new: Base, models: BothModels) -> Started:
        self._first = first = first_state(self.bottlenecks, old, new, models)
        at_work = _in_place(models.new, first.modules)
        zero = first.zero if self.bottlenecks.form.silent_at_zero else None
        return Started(at_work, first.how, len(first.modules), zero, first.untrained)


def _in_place(model: Loaded, modules: Mapping[Spot, nn.Module]) -> AtWork:
    return partial(placed, model, modules)
