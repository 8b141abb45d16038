"""Experts in a GGUF LoRA: one pair of tensors for all experts of a block, (experts, r, in) and (experts, out, r)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from regraft.adapter import MODEL, ModuleRef
from regraft.checkpoints._gguf_names import ARCHITECTURES
from regraft.checkpoints._views import Reshaped, RowRanges
from regraft.errors import InputError, OutputError
from regraft.formats._common import Parts
from regraft.formats._gguf_heads import NEEDS_BASE
from regraft.tensors import InMemory, TensorRef
from regraft.updates import LowRank


@dataclass(frozen=True)
class Expert:
    """One expert's module: llama.cpp's module (``blk.0.ffn_up_exps``) that it is a part of, and its number there."""

    module: str
    number: int


def experts_name(arch: str, pattern: str, block: int) -> str | None:
    """Transformers' name of a stacked module, with ``{}`` for the expert; None for other modules."""
    name = ARCHITECTURES[arch].names.get(pattern, "")
    return name.replace("{}", str(block), 1) if name.count("{}") == 2 else None


def expert_of(arch: str, path: str) -> Expert | None:
    """The stacked module that transformers' ``path`` is one expert of, or None."""
    for pattern, name in ARCHITECTURES[arch].names.items():
        if name.count("{}") == 2:
            found = re.fullmatch(re.escape(name).replace(r"\{\}", r"(\d+)"), path)
            if found:
                return Expert(pattern.format(found[1]), int(found[2]))
    return None


def split_experts(name: str, part: Parts, alpha: float, file: Path) -> dict[ModuleRef, LowRank]:
    """Every expert's own update.

    Args:
        name: from `experts_name`.
        part: with ``up`` (experts, out, r) and ``down`` (experts, r, in).
        alpha: the file's.
        file: for messages.

    Raises:
        InputError: the two tensors don't belong together.
    """
    if set(part.tensors) != {"up", "down"}:
        key = next(iter(part.keys.values()))
        raise InputError("has no matching half: half of the pair is missing", file=file, key=key)
    up, down = part.tensors["up"], part.tensors["down"]
    if len(up.shape) != 3 or len(down.shape) != 3 or up.shape[0] != down.shape[0] or up.shape[2] != down.shape[1]:
        what = f"{list(up.shape)} does not fit {list(down.shape)}"
        raise InputError(what, file=file, key=part.keys["up"], remedy="The file is damaged: get another one.")
    scale = alpha / up.shape[2] if alpha else 1.0
    stored_alpha = InMemory(torch.tensor(alpha)) if alpha else None
    return {
        ModuleRef(MODEL, name.format(i)): LowRank(_one(up, i), _one(down, i), scale, stored_alpha)
        for i in range(up.shape[0])
    }


def _one(ref: TensorRef, number: int) -> TensorRef:
    return Reshaped(RowRanges(ref, ((number, number + 1),)), ref.shape[1:])


def join_experts(module: str, experts: Mapping[int, LowRank], count: int | None) -> dict[str, TensorRef]:
    """The pair of tensors of all experts of a module.

    Args:
        module: llama.cpp's name.
        experts: by number, all of one scale.
        count: how many the base has.

    Raises:
        OutputError: some are missing, or their ranks differ: one pair can't hold them.
    """
    if count is None:
        raise OutputError("how many experts the base has is not known", key=module, remedy=NEEDS_BASE)
    missing = sorted(set(range(count)) - set(experts))
    if missing or len(experts) != count:
        what = f"a GGUF LoRA changes all {count} experts of a block or none: these are {len(experts)}"
        raise OutputError(what, key=module, remedy="Keep the old format.")
    if len({(update.up.shape, update.down.shape) for update in experts.values()}) > 1:
        raise OutputError("the experts' ranks or shapes differ", key=module, remedy="Keep the old format.")
    up = torch.stack([experts[i].up.load() for i in range(count)])
    down = torch.stack([experts[i].down.load() for i in range(count)])
    return {f"{module}.weight.lora_a": InMemory(down), f"{module}.weight.lora_b": InMemory(up)}
