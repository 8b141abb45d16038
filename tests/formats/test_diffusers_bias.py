"""A LoRA whose biases are on some modules alone runs in diffusers, which asks once for all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from regraft import load_adapter
from regraft.adapter import ModuleRef
from regraft.runtime import applied, load_model
from regraft.tensors import InMemory
from regraft.updates import LowRank
from verify import tiny


def said(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    states, words = (torch.randn(size, generator=generator) for size in ((2, 4, 8, 8), (2, 5, 8)))
    with torch.no_grad():
        found: Tensor = unet(states, torch.tensor([900, 100]), words).sample
    return found


def test_modules_without_a_bias_get_an_empty_one(tmp_path: Path) -> None:
    base = tiny.pipeline(tmp_path / "base")
    model = load_model(base)
    adapter = replace(tiny.lora({"unet": model.main}, ("to_q", "to_out.0"), size=0.5), format="diffusers")
    ref = next(ref for ref in adapter.updates if ref.path.endswith("to_out.0"))
    update = adapter.updates[ref]
    assert isinstance(update, LowRank)
    bias = InMemory(torch.randn(update.up.shape[0], generator=torch.Generator().manual_seed(1)))
    adapter = replace(adapter, updates={**adapter.updates, ref: replace(update, bias=bias)})
    adapter.save(tmp_path / "biased.safetensors")

    with applied(model.components, adapter):
        wanted = said(model.main)
    pipeline = load_model(base).pipeline
    pipeline.load_lora_weights(str(tmp_path), weight_name="biased.safetensors")
    assert torch.allclose(said(pipeline.unet), wanted, atol=1e-5)
    again = load_adapter(tmp_path / "biased.safetensors")
    empty = again.updates[ModuleRef("unet", next(r.path for r in adapter.updates if r.path.endswith("to_q")))]
    assert isinstance(empty, LowRank)
    assert empty.bias is not None
    assert not empty.bias.load().any()
