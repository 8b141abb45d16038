"""Each kind changes a weight as LyCORIS' module does. forward() is the judge: get_diff_weight() scales twice."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from updates_from import from_lycoris

from regraft.tensors import InMemory
from regraft.updates import GLora, LoKr

logging.disable(logging.WARNING)
lycoris = pytest.importorskip("lycoris.modules")


def linear() -> nn.Linear:
    return nn.Linear(16, 24)


def conv(kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(16, 24, kernel, padding=kernel // 2)


LAYERS = {
    "linear": linear,
    "conv": conv,
    "conv1x1": lambda: conv(1),
    "conv1d": lambda: nn.Conv1d(16, 24, 3),
    "conv3d": lambda: nn.Conv3d(16, 24, 3),
    "norm": lambda: nn.LayerNorm(16),
}
DORA = {"weight_decompose": True}
# algorithm, options, the layers it is tried on
CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("LoConModule", {}, ("linear", "conv", "conv1x1", "conv1d", "conv3d")),
    ("LoConModule", {"bypass_mode": True}, ("linear", "conv")),
    ("LoConModule", {"rs_lora": True}, ("linear", "conv")),
    ("LoConModule", {"use_scalar": True}, ("linear",)),
    ("LoConModule", DORA, ("linear", "conv", "conv1x1")),
    ("LoConModule", {**DORA, "wd_on_out": False}, ("linear", "conv", "conv1d")),
    ("LoConModule", {"use_tucker": True}, ("conv", "conv1d", "conv3d")),
    ("LoConModule", {"use_tucker": True, "bypass_mode": True}, ("conv",)),
    ("LoConModule", {"use_tucker": True, **DORA, "rs_lora": True}, ("conv",)),
    ("LohaModule", {}, ("linear", "conv", "conv1x1", "conv1d", "conv3d")),
    ("LohaModule", {"bypass_mode": True, "use_scalar": True}, ("linear", "conv")),
    ("LohaModule", {"rs_lora": True, **DORA}, ("linear", "conv")),
    ("LohaModule", {**DORA, "wd_on_out": False}, ("linear", "conv")),
    ("LohaModule", {"use_tucker": True}, ("conv", "conv1d", "conv3d")),
    ("LohaModule", {"use_tucker": True, **DORA, "wd_on_out": False}, ("conv",)),
    ("LokrModule", {}, ("linear", "conv", "conv1x1", "conv1d", "conv3d")),
    ("LokrModule", {"full_matrix": True}, ("linear", "conv", "conv1x1")),
    ("LokrModule", {"lora_dim": 1, "decompose_both": True, "factor": 4}, ("linear", "conv")),
    ("LokrModule", {"use_tucker": True, "lora_dim": 2}, ("conv", "conv1d", "conv3d")),
    ("LokrModule", {"unbalanced_factorization": True, "factor": 4}, ("linear", "conv")),
    ("LokrModule", {"bypass_mode": True, "use_scalar": True, "factor": 2}, ("linear", "conv")),
    ("LokrModule", {"rs_lora": True, **DORA, "factor": 2}, ("linear", "conv")),
    ("LokrModule", {**DORA, "wd_on_out": False, "full_matrix": True}, ("linear", "conv")),
    ("FullModule", {}, ("linear", "conv")),
    ("NormModule", {}, ("norm",)),
    ("IA3Module", {}, ("linear", "conv")),
    ("IA3Module", {"train_on_input": True}, ("linear", "conv", "conv1d")),
    ("GLoRAModule", {}, ("linear", "conv", "conv1x1")),
    ("GLoRAModule", {"use_scalar": True, "bypass_mode": True}, ("linear",)),
    ("DiagOFTModule", {}, ("linear", "conv", "conv1x1")),
    ("DiagOFTModule", {"constraint": 0.05}, ("linear",)),
    ("DiagOFTModule", {"constraint": 100.0, "rescaled": True}, ("linear", "conv")),
    ("ButterflyOFTModule", {"lora_dim": 6}, ("linear", "conv")),
    ("ButterflyOFTModule", {"constraint": 0.05, "rescaled": True, "lora_dim": 6}, ("linear", "conv")),
    ("ButterflyOFTModule", {"lora_dim": 12}, ("linear", "conv1x1")),
]
TABLE = [
    pytest.param(name, options, layer, id="-".join([name.removesuffix("Module"), layer, *map(str, options)]))
    for name, options, layers in CASES
    for layer in layers
]


def built(name: str, options: Mapping[str, Any], layer: nn.Module) -> nn.Module:
    """LyCORIS' module on ``layer``, its parameters random."""
    module = getattr(lycoris, name)("m", copy.deepcopy(layer), **{"lora_dim": 4, "alpha": 3.0, **options})
    if name == "FullModule":
        # Only then is the layer's weight part of its own, and its state dict the change.
        module.apply_to()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if options.get("use_scalar"):
            module.scalar.fill_(0.7)
        for part, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            around = part in ("dora_scale", "rescale", "scalar") or name == "FullModule"
            parameter.copy_(parameter + noise if around else noise)
    return module.eval()


def inputs(layer: nn.Module) -> Tensor:
    sizes = {nn.Linear: (5, 16), nn.LayerNorm: (5, 16), nn.Conv1d: (2, 16, 7), nn.Conv3d: (2, 16, 5, 5, 5)}
    return torch.randn(sizes.get(type(layer), (2, 16, 7, 7)), generator=torch.Generator().manual_seed(6))


def with_weight(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))


@pytest.mark.parametrize(("name", "options", "layer"), TABLE)
@torch.no_grad()
def test_a_merged_weight_gives_lycoris_own_output(name: str, options: dict[str, Any], layer: str) -> None:
    torch.manual_seed(0)
    base = LAYERS[layer]()
    module, x = built(name, options, base), inputs(base)
    state = module.state_dict()
    weight = base.weight.detach().clone()
    update = from_lycoris(state)
    bias = base.bias.detach().clone()
    for key in ("diff_b", "b_norm"):
        if key in state:
            bias = from_lycoris({key: state[key]}).merged(bias)
    merged = update.merged(weight)
    assert merged.shape == weight.shape
    wanted = module(x)
    assert float((merged - weight).norm()) > 1e-3
    assert float((with_weight(base, x, merged, bias) - wanted).abs().max()) <= 1e-5


STRENGTHS: dict[str, dict[str, Any]] = {
    "LoConModule": {},
    "LohaModule": {},
    "LokrModule": {"factor": 2},
    "FullModule": {},
    "IA3Module": {},
    "GLoRAModule": {},
    "DiagOFTModule": {"rescaled": True},
    "ButterflyOFTModule": {"lora_dim": 6, "rescaled": True},
}


@pytest.mark.parametrize("name", STRENGTHS)
@torch.no_grad()
def test_another_strength_is_lycoris_multiplier(name: str) -> None:
    torch.manual_seed(0)
    base = linear()
    module, x = built(name, STRENGTHS[name], base), inputs(base)
    module.multiplier = 0.6
    state = module.state_dict()
    bias = base.bias
    if "diff_b" in state:
        bias = from_lycoris({"diff_b": state["diff_b"]}).scaled(0.6).merged(bias)
    merged = from_lycoris(state).scaled(0.6).merged(base.weight)
    assert float((with_weight(base, x, merged, bias) - module(x)).abs().max()) <= 1e-5


@torch.no_grad()
def test_a_scalar_is_folded_into_the_stored_factors() -> None:
    for name in ("LoConModule", "LohaModule", "LokrModule", "GLoRAModule"):
        assert not any("scalar" in key for key in built(name, {"use_scalar": True}, linear()).state_dict())


def randomised(*weights: Tensor | None) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(8)
    return [None if w is None else torch.randn(w.shape, generator=generator) * 0.2 for w in weights]


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("both", [False, True])
@torch.no_grad()
def test_kernels_that_the_functional_lokr_leaves_unflattened_change_a_weight_alike(tucker: bool, both: bool) -> None:
    from lycoris.functional import lokr

    base = conv().weight
    made = randomised(*lokr.weight_gen(base, 1, tucker=tucker, factor=4, decompose_both=both))
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    refs = {name: InMemory(tensor) for name, tensor in zip(names, made, strict=True) if tensor is not None}
    update = LoKr(0.5, **refs)
    assert update.shape == base.shape
    torch.testing.assert_close(update.delta(), lokr.kron_weight(*made, scale=0.5))


@torch.no_grad()
def test_a_glora_with_a_core_changes_a_kernel_as_lycoris_formula_does() -> None:
    from lycoris.modules.glora import _glora_weight

    base = conv().weight
    shapes = ((16, 3, 1, 1), (3, 16, 1, 1), (24, 3, 1, 1), (3, 16, 1, 1), (3, 3, 3, 3))
    a1, a2, b1, b2, bm = randomised(*(torch.empty(shape) for shape in shapes))
    update = GLora(*(InMemory(tensor) for tensor in (a1, a2, b1, b2)), 0.5, InMemory(bm))
    assert update.shape == base.shape
    torch.testing.assert_close(update.delta(base), _glora_weight(base, a1, a2, b1, b2, bm, 0.5))
