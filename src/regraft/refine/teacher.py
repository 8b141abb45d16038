"""The old base with an adapter of any kind at work in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from regraft.adapter import Adapter
from regraft.probes.batches import AtWork
from regraft.runtime.applied import applied
from regraft.runtime.both import BothModels


@dataclass(frozen=True)
class Teacher:
    """What makes the old base a teacher.

    Attributes:
        at_work: a context inside of which the old base has the adapter; outside of it, it is as it was.
        path: of the adapter, for errors.
    """

    at_work: AtWork
    path: Path | None

    @classmethod
    def of(cls, models: BothModels, adapter: Adapter) -> Teacher:
        """The teacher by changes of weights."""
        return cls(partial(applied, models.old.components, adapter), adapter.path)
