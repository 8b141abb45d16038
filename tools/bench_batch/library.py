"""Libraries to measure with: many small adapters of mixed formats, and some at SD 1.5's true size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tools.bench_batch.sd15_size import make_pair
from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base, open_base
from regraft.tensors import InMemory
from regraft.updates import LoHa, LowRank, Update

#: Formats and kinds that adapters of SD 1.5 come in, in turn.
LORAS = tuple((name, "lora") for name in ("kohya", "diffusers", "lycoris", "onetrainer", "comfyui", "peft"))
MIXED = (*LORAS, ("lycoris", "loha"), ("lycoris", "dora"))
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
    return (old, new), _adapters(open_base(old), place / f"mixed-{count}", count, MIXED)


def make_full_size(place: Path, count: int) -> Library:
    """The pair of `sd15_size`, and ``count`` adapters of rank 8 on the U-Net's attention."""
    old, new = place / "sd15" / "old", place / "sd15" / "new"
    if not (new / "model_index.json").exists():
        make_pair(place / "sd15")
    return (old, new), _adapters(open_base(old), place / f"loras-{count}", count, LORAS)


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


def _adapters(base: Base, folder: Path, count: int, ways: Sequence[tuple[str, str]]) -> Path:
    """Adapters in turn of each format and kind; those that are there already are left as they are."""
    folder.mkdir(exist_ok=True)
    component = "unet" if "unet" in base.components else next(iter(base.components))
    modules = {path: ModuleRef(component, path) for path in base.modules(component) if ".attn" in path}
    for number in range(count):
        format, kind = ways[number % len(ways)]
        file = folder / (f"{number:05d}" if format == "peft" else f"{number:05d}.safetensors")
        if file.exists():
            continue
        generator = torch.Generator().manual_seed(number)
        updates = {ModuleRef("unet", path): _update(kind, base, ref, generator) for path, ref in modules.items()}
        Adapter(updates, format, family="sd15").save(file)
    return folder


def _update(kind: str, base: Base, module: ModuleRef, generator: torch.Generator) -> Update:
    shape = base.shape(module)
    if kind == "loha":
        one, two = (_lora(shape, _RANK // 2, generator) for _ in range(2))
        return LoHa(one.up, one.down, two.up, two.down, 1.0)
    lora = _lora(shape, _RANK, generator)
    if kind == "lora":
        return lora
    # As a trainer begins: m is the norm of each of the weight's rows.
    return replace(lora, magnitude=InMemory(base.weight(module).float().norm(dim=1, keepdim=True)))


def _lora(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> LowRank:
    up, down = (torch.randn(*size, generator=generator) * 0.02 for size in ((shape[0], rank), (rank, shape[1])))
    return LowRank(InMemory(up.half()), InMemory(down.half()), 1.0)
