"""Small models and the configurations that every tuner's tests share: a new tuner adds its rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from regraft.tuners import FouraConfig, LoraXConfig, SvdiffConfig


class Net(nn.Module):
    """Every kind of layer that a tuner may change."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.turned = Conv1D(10, 16)
        self.conv = nn.Conv2d(10, 8, 3, padding=1)
        self.group = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 9, 12) to (batch, 5)."""
        x = self.turned(torch.tanh(self.norm(self.lin(x))))
        x = self.group(self.conv(x.mT.reshape(-1, 10, 3, 3)))
        return self.head(torch.tanh(x.mean((2, 3))))


class Degenerate(nn.Module):
    """Weights with repeated singular values: orthogonal, a block of a permutation, of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(12, 12, bias=False) for _ in range(3))
        self.a.weight.data = torch.linalg.qr(torch.randn(12, 12))[0]
        self.b.weight.data = torch.block_diag(torch.eye(6)[torch.randperm(6)], 2 * torch.eye(6))
        self.c.weight.data = torch.randn(12, 3) @ torch.randn(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


def other_machines() -> Iterator[torch.dtype]:
    """Other threads, another dtype of the same values, and another solver's choice of basis, one after the other."""
    solver = torch.linalg.svd

    def other(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        # The transpose's decomposition: another basis wherever there is a choice.
        u, s, vh = solver(matrix.mT.contiguous(), full_matrices=full_matrices)
        return vh.mT, s, u.mT

    for threads, dtype, decomposed in (
        (2, torch.float32, solver),
        (1, torch.bfloat16, solver),
        (1, torch.float64, solver),
        (1, torch.float32, other),
    ):
        torch.set_num_threads(threads)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.linalg, "svd", decomposed)
            yield dtype


LAYERS = ["lin", "turned", "conv"]
#: Name → configuration class and options.
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "lorax": (LoraXConfig, {"r": 5, "target_modules": LAYERS}),
    "lorax full": (LoraXConfig, {"r": 5, "full": True, "target_modules": LAYERS}),
    "lorax energy": (LoraXConfig, {"energy": 0.7, "target_modules": LAYERS}),
    "lorax stored": (LoraXConfig, {"r": 5, "store_bases": True, "target_modules": LAYERS}),
    "lorax by default": (LoraXConfig, {"target_modules": LAYERS}),
    "lorax pattern": (LoraXConfig, {"r": 5, "rank_pattern": {"lin": 3}, "target_modules": LAYERS}),
    "svdiff": (SvdiffConfig, {"target_modules": LAYERS}),
    "svdiff norms": (SvdiffConfig, {"target_modules": [*LAYERS, "norm", "group"]}),
    "svdiff scalar norms": (SvdiffConfig, {"norm_shift": "scalar", "target_modules": [*LAYERS, "norm", "group"]}),
    "foura": (FouraConfig, {"r": 4, "target_modules": LAYERS}),
    "foura fft": (FouraConfig, {"r": 4, "transform": "fft", "target_modules": LAYERS}),
    "foura none": (FouraConfig, {"r": 4, "gate": "none", "target_modules": LAYERS}),
    "foura none fft": (
        FouraConfig,
        {"r": 4, "gate": "none", "transform": "fft", "rank_pattern": {"lin": 3}, "target_modules": LAYERS},
    ),
    "foura frozen": (FouraConfig, {"r": 4, "gate": "frozen", "target_modules": LAYERS}),
    "foura frozen fft": (FouraConfig, {"r": 4, "gate": "frozen", "transform": "fft", "target_modules": LAYERS}),
}
#: Cases whose every change of a weight is a matrix.
MERGEABLE = [name for name, (_, options) in CASES.items() if not name.startswith("foura") or "gate" in options]


def config(case: str, **options: Any) -> Any:
    kind, own = CASES[case]
    return kind(**{**copy.deepcopy(own), **options})


def base(seed: int = 0, net: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(seed)
    return net().eval()


def fresh(case: str, seed: int = 0, **options: Any) -> PeftModel:
    """A base with an adapter as it begins."""
    return get_peft_model(base(seed), config(case, **options)).eval()


def stir(model: nn.Module, seed: int = 1, name: str = "") -> nn.Module:
    """Give every trainable tensor, of one adapter where it is named, values that a training could have given it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad if not name else key.endswith(f".{name}") or f".{name}." in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def trained(case: str, seed: int = 0, **options: Any) -> PeftModel:
    return stir(fresh(case, seed, **options))


def data(seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 9, 12).to(dtype)


@torch.no_grad()
def output(model: nn.Module, x: Tensor | None = None) -> Tensor:
    return model(data() if x is None else x)
