"""What Procrustes finds between bases that have nothing in common, and what it reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from regraft import ModuleRef
from regraft.adapter import MODEL
from regraft.methods import Shapes
from regraft.methods._subspace import subspaces
from regraft.methods.procrustes import procrustes
from regraft.nearness import Nearness, compare
from toys import StateDict, drifted, llama, permutation, regauged, rotation


class Pairs:
    """`WeightPairs` over two state dicts."""

    def __init__(self, old: StateDict, new: StateDict, wanted: tuple[str, ...] = ("q_proj", "down_proj")) -> None:
        self.old, self.new, self.read = old, new, Counter[str]()
        self.all = [ModuleRef(MODEL, n.removesuffix(".weight")) for n, t in old.items() if t.dim() == 2]
        self.wanted = [module for module in self.all if module.path.endswith(wanted)]

    def __iter__(self) -> Iterator[ModuleRef]:
        return iter(self.all)

    def shapes(self, module: ModuleRef) -> Shapes:
        return tuple(tuple(state[f"{module.path}.weight"].shape) for state in (self.old, self.new))

    def load(self, module: ModuleRef) -> tuple[Tensor, Tensor]:
        self.read[module.path] += 1
        return self.old[f"{module.path}.weight"], self.new[f"{module.path}.weight"]

    def nearness(self, module: ModuleRef) -> Nearness:
        return compare(*self.load(module))


def test_unrelated_weights_are_no_more_alike_than_chance_makes_them() -> None:
    similarity = procrustes(Pairs(llama(0), llama(1)), keep_identity=2.0).similarity.values()
    assert abs(sum(similarity) / len(similarity)) < 0.1


@pytest.mark.parametrize("gauge", [rotation, permutation])
def test_the_same_model_in_other_coordinates_is_recognised(gauge) -> None:
    old = llama()
    fit = procrustes(Pairs(old, regauged(old, gauge(24, 1), gauge(40, 2))))
    assert min(fit.similarity.values()) > 0.99


def test_only_weights_that_bear_on_the_wanted_modules_are_read() -> None:
    stream = "unet.attentions.{}.transformer_blocks.0.attn1.to_{}.weight"
    state = {stream.format(block, role): torch.randn(8, 8) for block in (0, 1) for role in "qkv"}
    state["unet.resnets.0.conv1.weight"] = torch.randn(8, 8)
    pairs = Pairs(state, state, wanted=("attentions.1.transformer_blocks.0.attn1.to_q",))
    assert set(procrustes(pairs).transports) == set(pairs.wanted)
    assert set(pairs.read) == {stream.format(1, role).removesuffix(".weight") for role in "qkv"}


def test_between_near_bases_each_weight_is_read_once() -> None:
    old = llama()
    pairs = Pairs(old, drifted(old, 0.1))
    assert procrustes(pairs).reason == "every hidden space is still in place"
    assert set(pairs.read.values()) == {1}


def test_a_share_of_one_is_the_full_rank_and_no_factor_is_kept_whole() -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    assert subspaces(weight, 1.0, None)[0].shape == (12, 8)
    assert subspaces(weight, 1, None)[0].shape == (12, 1)
    for part in subspaces(weight, 0.5, None):
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
