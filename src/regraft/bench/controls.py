"""What every method is measured beside, in every pair, adapter and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from regraft.adapter import Adapter
from regraft.bench.worlds import Scores

#: Row → what it is. "old" is no row of the tables: retention is counted from it.
CONTROLS = {
    "none": "the new base alone",
    "copy": "every update under the same name, where it fits",
    "best copy": (
        "the copy at the one strength that is best on the other half of the test inputs, each half scored with the "
        "strength that the other chose: what scaling alone can do, labels given"
    ),
    "random": "random updates of the copy's ranks and norms (the native's, where nothing can be copied)",
    "empty": "an adapter without an update: equal to none, or the measurement is wrong",
    "reverted": "the old base with its LoRA in the new one's place: the teacher, and what undoing the upgrade brings",
    "native": "an adapter trained on the new base with the same budget",
    "old": "the old base alone",
}

#: Those that shares are counted from; the others tell of the measurement itself.
FEW = ("none", "copy", "reverted", "native", "old")

#: That the best copy is chosen from; 1 is the copy itself.
STRENGTHS = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2)


def empty_like(adapter: Adapter) -> Adapter:
    """An adapter of the same format without an update."""
    return replace(adapter, updates={}, tokens={})


def crossed(scores: Mapping[float, Scores]) -> tuple[Scores, dict[str, float]]:
    """The best strength's scores, chosen for each half of the inputs on the other half; and which they were.

    Args:
        scores: strength → its scores on all inputs.
    """
    strengths = list(scores)
    n = len(scores[strengths[0]].task)
    chosen = []
    for half in (0, 1):
        other = np.arange(n) % 2 != half
        means = [scores[strength].task[other].mean() for strength in strengths]
        chosen.append(strengths[int(np.argmax(means))])
    task, retention = (_woven([getattr(scores[s], part) for s in chosen]) for part in ("task", "retention"))
    one, two = (scores[s].extra for s in chosen)
    extra = {name: (value + two[name]) / 2 for name, value in one.items() if name in two}
    return Scores(task, retention, extra), {"strength": sum(chosen) / 2}


def _woven(halves: Sequence[np.ndarray]) -> np.ndarray:
    """Even places from the first array, odd ones from the second."""
    return np.where(np.arange(len(halves[0])) % 2 == 0, *halves)
