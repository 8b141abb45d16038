"""Each kind changes a weight as PEFT's own merge does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft.tensors import InMemory, TensorRef
from regraft.updates import Boft, Ia3, LoHa, LoKr, LowRank, Oft, Update

peft = pytest.importorskip("peft")

OFT: dict[str, Any] = {"oft_block_size": 4, "r": 0}


class Tiny(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"linear": nn.Linear(16, 24), "conv": nn.Conv2d(16, 24, 3), "conv1d": nn.Conv1d(16, 24, 3)}


def update_from(state: Mapping[str, Tensor], config: Any) -> Update:
    """The update that PEFT's state dict and configuration hold."""
    refs: dict[str, TensorRef] = {key.partition("layer.")[2]: InMemory(value.clone()) for key, value in state.items()}
    name = next(iter(refs))
    if name.startswith("hada_"):
        fields = {key.removeprefix("hada_"): ref for key, ref in refs.items()}
        return LoHa(scale=config.alpha / config.r, **fields)
    if name.startswith("lokr_"):
        fields = {key.removeprefix("lokr_"): ref for key, ref in refs.items()}
        # Also where both halves are full, unlike LyCORIS.
        return LoKr(scale=config.alpha / config.r, **fields)
    if "ia3_l" in refs:
        on_input = InMemory(torch.tensor(int(bool(config.feedforward_modules))))
        return Ia3(refs["ia3_l"], on_input, convention="peft")
    if "oft_R.weight" in refs:
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        eps = config.eps if config.coft else None
        return Oft(refs["oft_R.weight"], convention="peft", terms=terms, eps=eps)
    if "boft_R" in refs:
        return Boft(refs["boft_R"], refs["boft_s"], convention="peft")
    magnitude = refs["lora_magnitude_vector"]
    flat = InMemory(magnitude.load().flatten())
    return LowRank(refs["lora_B.weight"], refs["lora_A.weight"], config.lora_alpha / config.r, magnitude=flat)


CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("LoHaConfig", {"r": 3, "alpha": 5}, ("linear", "conv", "conv1d")),
    ("LoHaConfig", {"r": 3, "alpha": 5, "use_effective_conv2d": True}, ("conv", "conv1d")),
    ("LoKrConfig", {"r": 2, "alpha": 5}, ("linear", "conv", "conv1d")),
    ("LoKrConfig", {"r": 8, "alpha": 5}, ("linear", "conv")),
    ("LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 4}, ("linear", "conv")),
    ("LoKrConfig", {"r": 2, "alpha": 5, "use_effective_conv2d": True}, ("conv", "conv1d")),
    ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_dora": True}, ("linear", "conv")),
    ("IA3Config", {"feedforward_modules": []}, ("linear", "conv")),
    ("IA3Config", {"feedforward_modules": ["layer"]}, ("linear", "conv")),
    ("OFTConfig", {**OFT, "use_cayley_neumann": False}, ("linear", "conv")),
    ("OFTConfig", {**OFT, "use_cayley_neumann": False, "block_share": True}, ("linear", "conv")),
    ("OFTConfig", {**OFT, "use_cayley_neumann": False, "coft": True, "eps": 0.3}, ("linear",)),
    *(
        ("OFTConfig", {**OFT, "use_cayley_neumann": True, "num_cayley_neumann_terms": n}, ("linear",))
        for n in (2, 3, 4, 5, 6)
    ),
    ("BOFTConfig", {"boft_block_size": 4}, ("linear", "conv")),
    ("BOFTConfig", {"boft_block_size": 2, "boft_n_butterfly_factor": 3}, ("linear", "conv")),
    ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}, ("linear",)),
]
TABLE = [
    pytest.param(name, options, layer, id="-".join([name.removesuffix("Config"), layer, *map(str, options.values())]))
    for name, options, tried in CASES
    for layer in tried
]


@pytest.fixture(autouse=True)
def _butterflies_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT allows more than one stage only beside its CUDA extension: the same sum, in torch."""
    from peft.tuners.boft import layer

    class Blocks:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*stage) for stage in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options", "layer"), TABLE)
@torch.no_grad()
def test_a_merged_weight_is_the_one_that_peft_merges(name: str, options: dict[str, Any], layer: str) -> None:
    base = layers()[layer]
    config = getattr(peft, name)(target_modules=["layer"], **options)
    model = peft.get_peft_model(Tiny(copy.deepcopy(base)), config)
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if peft.get_peft_model_state_dict(model) and parameter.requires_grad:
            around = any(word in key for word in ("ia3_l", "boft_s", "magnitude"))
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(parameter + noise if around else noise)
    update = update_from(peft.get_peft_model_state_dict(model), config)
    wanted = model.merge_and_unload().layer
    merged = update.merged(base.weight)
    assert float((merged - base.weight).norm()) > 1e-2
    assert float((merged - wanted.weight).abs().max()) <= 1e-5
    if isinstance(update, Ia3):
        assert base.bias is not None
        torch.testing.assert_close(update.merged_bias(base.bias), wanted.bias)
