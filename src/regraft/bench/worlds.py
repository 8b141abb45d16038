"""What the benchmark asks of a world: bases, adapters on them, and how good an adapter is on a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from regraft.adapter import Adapter

Which = Literal["old", "new"]


@dataclass(frozen=True)
class PairSpec:
    """A pair of bases of the benchmark.

    Attributes:
        name: such as ``lm-drift-2``.
        world: who trains, loads and scores it.
        relation: how the new base came from the old one.
        expects: which of the goals applies.
        about: how the new base was made, in a line for people.
        adapters: names of the adapters that are carried.
        seeds: seeds that they are trained with.
    """

    name: str
    world: Literal["language", "diffusion", "encoder"]
    relation: Literal["near", "drift", "pruned", "wider", "deeper", "scratch", "tokenizer", "quantised"]
    expects: Literal["near", "strong", "pruned", "grown", "far"]
    about: str
    adapters: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """How good a base with an adapter is; higher is better throughout.

    Attributes:
        task: one per test input of what the adapter is for.
        retention: one per input of what the new base does better than the old one.
        extra: further figures by name.
    """

    task: NDArray[np.float64]
    retention: NDArray[np.float64]
    extra: Mapping[str, float] = field(default_factory=dict)


#: Scores an adapter that is named as the base's own modules are; None is the base alone.
Scorer = Callable[[Adapter | None], Scores]


class World(Protocol):
    """Trains (or fetches) what is missing in its cache on first use.

    Five further members are taken where a world has them: ``loaded(pair, which)`` gives a base as a
    `regraft.runtime.Loaded`, where `load_model` doesn't know it; ``probe(pair, seed)`` gives inputs that `make_probe`
    can't make, or None; ``version`` is a number that rises when scores are made in another way;
    ``trained_in(pair, name, seed)`` gives the seconds of the native adapter's training, or None;
    ``bridged(pair, name, bridge)`` gives the scores of a `regraft.bridge.logits.LogitBridge`.
    """

    pairs: tuple[PairSpec, ...]

    def base(self, pair: str, which: Which) -> Path:
        """The base's folder."""
        ...

    def adapter(self, pair: str, name: str, seed: int) -> Path:
        """The adapter trained on the old base."""
        ...

    def native(self, pair: str, name: str, seed: int) -> Path:
        """The one trained on the new base with the same budget."""
        ...

    def scorer(self, pair: str, which: Which, name: str) -> AbstractContextManager[Scorer]:
        """A scorer of ``name``'s task, the model held in memory."""
        ...

    def inputs(self, pair: str) -> dict[str, Any]:
        """Options for `regraft.probes.make_probe` and the methods that run both models."""
        ...
