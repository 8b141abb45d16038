"""Bottleneck adapters in AdapterHub's layout, trained for a moment by a forward of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.runtime import load_model

#: What the library itself wrote; see tests/data/README.md.
HUB = Path(__file__).parents[1] / "data" / "adapterhub"
SIZE = 4
PFEIFFER = {
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 4,
    "non_linearity": "relu",
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "scaling": 1.0,
    "is_parallel": False,
}


class Small(nn.Module):
    """A bottleneck of Pfeiffer's behind a feed-forward, restated: f + U relu(D (f + r) + b) + c."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, SIZE), nn.Linear(SIZE, width)
        self.residual: Any = None

    def note(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.residual = args[0]

    def forward(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + self.up(torch.relu(self.down(output + self.residual)))


@contextmanager
def hooked(model: nn.Module, smalls: list[Small]) -> Iterator[None]:
    handles = []
    for layer, small in zip(model.model.layers, smalls, strict=True):
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(small.note))
        handles.append(layer.mlp.register_forward_hook(small))
    yield
    for handle in handles:
        handle.remove()


def trained(base: Path) -> list[Small]:
    """Trained for a moment to go from each word to a certain other one."""
    model = load_model(base).main
    torch.manual_seed(3)
    smalls = [Small(16), Small(16)]
    optimizer = torch.optim.Adam([p for small in smalls for p in small.parameters()], lr=2e-2)
    with hooked(model, smalls):
        for _ in range(60):
            ids = torch.randint(3, 48, (16, 12))
            said = model(input_ids=ids).logits
            F.cross_entropy(said.flatten(0, 1), (3 + (7 * ids) % 45).flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return smalls


def saved(smalls: list[Small], folder: Path, **options: Any) -> Path:
    """As the library saves them."""
    tensors = {
        f"model.layers.{i}.output_adapters.adapters.words.{name}": tensor.data
        for i, small in enumerate(smalls)
        for name, tensor in {
            "adapter_down.0.weight": small.down.weight,
            "adapter_down.0.bias": small.down.bias,
            "adapter_up.weight": small.up.weight,
            "adapter_up.bias": small.up.bias,
        }.items()
    }
    folder.mkdir(parents=True)
    config = {
        "config": {**PFEIFFER, **options},
        "hidden_size": 16,
        "model_class": "LlamaForCausalLM",
        "model_name": "old",
        "model_type": "llama",
        "name": "words",
        "version": "adapters.1.3.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder
