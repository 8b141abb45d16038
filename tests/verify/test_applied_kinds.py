"""Every kind of update is merged into a running model, and taken out again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from regraft import Adapter, ModuleRef
from regraft.adapter import MODEL
from regraft.probes.controls import random_like
from regraft.runtime.applied import applied, find_places
from regraft.tensors import InMemory
from regraft.updates import (
    Diff,
    Foura,
    FourierFT,
    GLora,
    Ia3,
    LoHa,
    LoKr,
    Oft,
    SpectralShift,
    Subspace,
    Tucker,
    Update,
    Vera,
)


def values(*shape: int, seed: int = 0) -> InMemory:
    return InMemory(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2)


UPDATES: dict[str, Update] = {
    "proj": LoKr(1.0, w1=values(2, 2), w2=values(6, 4, seed=1)),
    "conv": LoHa(values(12, 2), values(2, 72, seed=1), values(12, 2, seed=2), values(2, 72, seed=3), 1.0),
    "core": Tucker(values(12, 2, 1, 1), values(2, 2, 3, 3), values(2, 8, 1, 1), 1.0),
    "turned": Oft(values(3, 4, 4)),
    "scaled": Ia3(InMemory(1 + values(12, 1).load()), InMemory(torch.tensor(0)), convention="peft"),
    "both": GLora(values(8, 2), values(2, 8), values(12, 2), values(2, 8), 0.5),
    "shifted": SpectralShift(values(8)),
    "inside": Subspace(values(3)),
    "waves": Foura(values(2, 8), values(12, 2, seed=1), 0.5),
    "vectors": Vera(values(12), values(2, seed=1), values(2, 9, seed=2), values(12, 2, seed=3)),
    "spectrum": FourierFT(values(40), 30.0, 7),
    "norm.weight": Diff(values(8), "norm.w_norm"),
    "norm.bias": Diff(values(8, seed=1), "norm.b_norm"),
}
ADAPTER = Adapter({ModuleRef(MODEL, path): update for path, update in UPDATES.items()}, "lycoris")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    names = ("proj", "turned", "scaled", "both", "shifted", "inside", "waves", "vectors", "spectrum")
    linear = {name: nn.Linear(8, 12) for name in names}
    kernels = {name: nn.Conv2d(8, 12, 3) for name in ("conv", "core")}
    return nn.ModuleDict({**linear, **kernels, "norm": nn.LayerNorm(8)})


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_each_parameter_is_the_merged_one_inside_and_the_old_one_after(model: nn.Module) -> None:
    before = tensors(model)
    with applied({MODEL: model}, ADAPTER):
        inside = tensors(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
    for path, update in UPDATES.items():
        name = path if update.by_parameter else f"{path}.weight"
        torch.testing.assert_close(inside[name], update.merged(before[name]))
        assert not torch.equal(inside[name], before[name])


def test_ia3_scales_the_whole_output_as_peft_does(model: nn.Module) -> None:
    layer, x = copy.deepcopy(model["scaled"]), torch.randn(4, 8)
    with applied({MODEL: model}, ADAPTER):
        got = model["scaled"](x)
    torch.testing.assert_close(got, layer(x) * UPDATES["scaled"].parts()["weight"].load().flatten())


def test_an_update_of_another_size_has_no_place(model: nn.Module) -> None:
    wrong = Adapter({ModuleRef(MODEL, "turned"): Oft(values(5, 4, 4))}, "lycoris")
    found, lost = find_places({MODEL: model}, wrong)
    assert not found
    assert "its shape is" in next(iter(lost.values()))


def test_a_random_control_changes_each_parameter_as_much(model: nn.Module) -> None:
    found, _ = find_places({MODEL: model}, ADAPTER)
    made, _ = find_places({MODEL: model}, random_like({MODEL: model}, ADAPTER, 0))
    assert made.keys() == found.keys()
    for ref, place in found.items():
        assert made[ref].change() == pytest.approx(place.change(), rel=1e-3)


@pytest.mark.parametrize("numbers", [1, 8], ids=["of its length", "of its elements"])
def test_a_random_control_of_a_norm_s_shift_changes_the_norm_as_much(numbers: int, model: nn.Module) -> None:
    shifted = Adapter({ModuleRef(MODEL, "norm"): SpectralShift(values(numbers))}, "svdiff")
    (wanted,) = find_places({MODEL: model}, shifted)[0].values()
    (made,) = find_places({MODEL: model}, random_like({MODEL: model}, shifted, 0))[0].values()
    assert made.tensor is wanted.tensor
    assert made.change() == pytest.approx(wanted.change(), rel=1e-3)
