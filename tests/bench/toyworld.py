"""A world of tiny random models whose scores are known by hand.

The adapter on the old base is a change D; the new base wants 0.8 · D, which is its native adapter. On an input x an
adapter that changes the weight by s · D scores −‖(s − 0.8) D x‖², so that a copy (s = 1) recovers 1 − (0.2 / 0.8)² and
a strength of 0.85 recovers 1 − (0.05 / 0.8)². On the old base D itself is wanted. The new base leads by 1 on each
retention input, and an adapter of strength s takes s / 2 of that away.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "verify"))
import tiny

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.bench.worlds import PairSpec, Scorer, Scores
from regraft.formats import load_adapter
from regraft.tensors import InMemory
from regraft.updates import LowRank

WANTED, N = 0.8, 40
COPY, BEST = 1 - (0.2 / WANTED) ** 2, 1 - (0.05 / WANTED) ** 2
FACTORY = {"language": "toyworld:ToyWorld"}
_WIDTHS = {"old": 16, "toy-near": 16, "toy-far": 24}


class ToyWorld:
    pairs = (
        PairSpec("toy-near", "language", "drift", "near", "moved a little", ("one", "two"), (0, 1)),
        PairSpec("toy-far", "language", "scratch", "far", "another width", ("one",), (0,)),
    )

    def __init__(self, cache: Path) -> None:
        self.cache = cache / "toy"

    def base(self, pair: str, which: str) -> Path:
        name = "old" if which == "old" else pair
        folder = self.cache / name
        if not (folder / "model.safetensors").exists():
            seed = 1 if pair == "toy-far" and which == "new" else 0
            tiny.llama(folder, width=_WIDTHS[name], seed=seed, drift=0.0 if name == "old" else 0.01)
        return folder

    def adapter(self, pair: str, name: str, seed: int) -> Path:
        return self._lora("old", name, seed, 1.0)

    def native(self, pair: str, name: str, seed: int) -> Path:
        return self._lora(pair, name, seed, WANTED)

    def _lora(self, base: str, name: str, seed: int, strength: float) -> Path:
        folder = self.cache / f"{base}-{name}-{seed}"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            width = _WIDTHS[base]
            generator = torch.Generator().manual_seed(len(name))
            up, down = torch.randn(width, 2, generator=generator), torch.randn(2, width, generator=generator)
            ref = ModuleRef(MODEL, "model.layers.1.self_attn.q_proj")
            Adapter({ref: LowRank(InMemory(up), InMemory(down), strength)}, "peft").save(folder)
        return folder

    @contextmanager
    def scorer(self, pair: str, which: str, name: str) -> Iterator[Scorer]:
        def score(adapter: Adapter | None) -> Scores:
            base = "old" if which == "old" else pair
            inputs = np.random.default_rng(0).normal(size=(N, _WIDTHS[base]))
            wanted = _delta(load_adapter(self._lora(base, name, 0, 1.0 if which == "old" else WANTED)))
            change = _delta(adapter)
            change = np.zeros_like(wanted) if change is None else change
            strength = float((change * wanted).sum() / (wanted * wanted).sum()) * (1.0 if which == "old" else WANTED)
            task = -np.square(inputs @ (change - wanted).T).sum(1)
            lead = (which == "new") - strength / 2 * (which == "new")
            return Scores(task, inputs[:, 0] + lead, {"strength": strength})

        yield score

    def inputs(self, pair: str) -> dict[str, Any]:
        return {"n_inputs": 4}


def _delta(adapter: Adapter | None) -> Any:
    if adapter is None or not adapter.updates:
        return None
    (update,) = adapter.updates.values()
    assert isinstance(update, LowRank)
    return update.delta().double().numpy()
