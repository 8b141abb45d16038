"""Small adapters for the tests of the verbs on adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from regraft import Adapter, ModuleRef, load_adapter
from regraft.tensors import InMemory
from regraft.updates import LowRank

#: Modules of SD 1.5's U-Net: linear, 1 × 1 convolution, 3 × 3 convolution.
UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": (320, 1280),
    "down_blocks.0.attentions.0.proj_in": (320, 320, 1, 1),
    "down_blocks.0.resnets.0.conv1": (320, 320, 3, 3),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def factors(shape: tuple[int, ...], rank: int, seed: int, scale: float = 1.0) -> LowRank:
    """A LoRA of this shape."""
    tail = [1] * (len(shape) - 2)
    up, down = noise(shape[0], rank, *tail, seed=seed), noise(rank, *shape[1:], seed=seed + 1)
    return LowRank(InMemory(up), InMemory(down), scale)


def unet_lora(*, rank: int = 6, seed: int = 0, scale: float = 0.5) -> Adapter:
    """A kohya LoRA with convolutions on a few modules of SD 1.5."""
    updates = {
        ModuleRef("unet", path): factors(shape, rank, seed + 10 * i, scale)
        for i, (path, shape) in enumerate(UNET.items())
    }
    return Adapter(updates, "kohya", family="sd15")


def saved(adapter: Adapter, path: Path, format: str | None = None) -> Adapter:
    """The adapter as it comes back from disk."""
    adapter.save(path, format=format)
    return load_adapter(path)


def with_magnitude(adapter: Adapter, seed: int = 3) -> Adapter:
    """The same as DoRA."""
    updates = {
        ref: replace(update, magnitude=InMemory(noise(update.shape[0], seed=seed).abs() + 1))
        for ref, update in adapter.updates.items()
    }
    return replace(adapter, updates=updates)


def close(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> bool:
    return float((one - two).norm()) <= tolerance * float(two.norm())
