"""Libraries to measure with: many small adapters of mixed formats, and some at SD 1.5's true size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tools.bench_batch.sd15_size import make_pair
from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base, open_base
from regraft.tensors import InMemory
from regraft.updates import LowRank

#: Formats that LoRAs of SD 1.5 come in, in turn.
FORMATS = ("kohya", "diffusers", "lycoris", "onetrainer", "comfyui")
# Every other block of the U-Net at a quarter of its width.
_WIDTH, _CONTEXT, _BLOCKS, _RANK = 80, 192, 4, 8
_DRIFT = 0.1

Library = tuple[tuple[Path, Path], Path]


def make_small(place: Path, count: int) -> Library:
    """A pair of U-Nets at reduced size with SD 1.5's names, and ``count`` adapters."""
    old, new = place / "small-old.safetensors", place / "small-new.safetensors"
    if not new.exists():
        state = _unet()
        generator = torch.Generator().manual_seed(1)
        moved = {n: w + _DRIFT * 0.02 * torch.randn(w.shape, generator=generator) for n, w in state.items()}
        save_file(state, old)
        save_file(moved, new)
    return (old, new), _adapters(open_base(old), place / f"small-{count}", count)


def make_full_size(place: Path, count: int) -> Library:
    """The pair of `sd15_size`, and ``count`` adapters of rank 8 on the U-Net's attention."""
    old, new = place / "sd15" / "old", place / "sd15" / "new"
    if not (new / "model_index.json").exists():
        make_pair(place / "sd15")
    return (old, new), _adapters(open_base(old), place / f"full-{count}", count)


def _unet() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for block in range(_BLOCKS):
        home = f"down_blocks.{block // 2}.attentions.{block % 2}.transformer_blocks.0"
        for attention, context in (("attn1", _WIDTH), ("attn2", _CONTEXT)):
            for name, inputs in (("to_q", _WIDTH), ("to_k", context), ("to_v", context), ("to_out.0", _WIDTH)):
                weight = torch.randn(_WIDTH, inputs, generator=generator) * 0.02
                state[f"{home}.{attention}.{name}.weight"] = weight
    return state


def _adapters(base: Base, folder: Path, count: int) -> Path:
    """Adapters in turn of each format; those that are there already are left as they are."""
    folder.mkdir(exist_ok=True)
    component = "unet" if "unet" in base.components else next(iter(base.components))
    modules = [path for path in base.modules(component) if ".attn" in path]
    for number in range(count):
        file = folder / f"{number:05d}.safetensors"
        if file.exists():
            continue
        generator = torch.Generator().manual_seed(number)
        updates = {
            ModuleRef("unet", path): _update(base.shape(ModuleRef(component, path)), generator) for path in modules
        }
        adapter = Adapter(updates, "diffusers", family="sd15")
        replace(adapter, format=FORMATS[number % len(FORMATS)]).save(file)
    return folder


def _update(shape: tuple[int, ...], generator: torch.Generator) -> LowRank:
    up = torch.randn(shape[0], _RANK, generator=generator) * 0.02
    down = torch.randn(_RANK, shape[1], generator=generator) * 0.02
    return LowRank(InMemory(up.half()), InMemory(down.half()), 1.0)
