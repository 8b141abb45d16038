"""The order of query and key rows: llama.cpp's converter changes it, so that a LoRA's B must be changed alike.

Which architectures it concerns is said in `regraft.checkpoints._gguf_names`. The order depends on the number of
heads, which an adapter file doesn't state: it comes from the base's config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoints._gguf_names import ARCHITECTURES, _by_role, _halves, _heads
from regraft.errors import InputError
from regraft.tensors import Shape, TensorRef

#: Row of transformers' order → row of llama.cpp's.
Order = Callable[[Tensor], Tensor]
NEEDS_BASE = "Give the base (--base, --from or --to): its config.json says how many heads there are."


@dataclass(frozen=True)
class HeadOrder:
    """Rows of a GGUF adapter's tensor in transformers' order.

    Attributes:
        of: (out, r) as the file has it.
        order: None where the number of heads is not known, so that the values can't be given.
        file: for the message.
        key: likewise.
    """

    of: TensorRef
    order: Order | None
    file: Path
    key: str

    @property
    def shape(self) -> Shape:
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def load(self) -> Tensor:
        if self.order is None:
            what = "llama.cpp reorders these rows by heads, and how many there are is not known"
            raise InputError(what, file=self.file, key=self.key, remedy=NEEDS_BASE)
        return self.of.load()[self.order(torch.arange(self.shape[0]))]


def reorders(arch: str, module: str) -> bool:
    """Whether llama.cpp keeps the rows of a module (``blk.{}.attn_q``) in another order than transformers."""
    known, role = ARCHITECTURES[arch], module.rpartition(".")[2]
    return (known.interleaved and role in ("attn_q", "attn_k")) or (known.grouped and role == "attn_qkv")


def order_of(arch: str, module: str, block: int, rows: int, fields: Mapping[str, Any]) -> Order | None:
    """The order of a module that `reorders`, or None where the number of heads isn't known or doesn't fit.

    Args:
        arch: llama.cpp's name.
        module: ``blk.{}.attn_q``.
        block: its number.
        rows: of the weight.
        fields: with ``<arch>.attention.head_count`` and ``…_kv``.
    """
    role = module.rpartition(".")[2]
    heads = _heads(fields, arch, block, kv=role == "attn_k")
    if heads is None:
        return None
    if role == "attn_qkv":
        return partial(_by_role, head=rows // heads // 3, heads=heads) if rows % (3 * heads) == 0 else None
    return partial(_halves, head=rows // heads) if rows % (2 * heads) == 0 else None


def to_llama_cpp(rows: Tensor, order: Order) -> Tensor:
    """The inverse of `HeadOrder`: rows in transformers' order as llama.cpp stores them."""
    stored = torch.empty_like(rows)
    stored[order(torch.arange(rows.shape[0]))] = rows
    return stored


def head_fields(arch: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The numbers of heads and experts in a transformers config, by llama.cpp's keys."""
    config = config or {}
    heads = config.get("num_attention_heads", config.get("n_head"))
    kv = config.get("num_key_value_heads")
    experts = config.get("num_local_experts", config.get("num_experts"))
    found = {f"{arch}.attention.head_count": heads, f"{arch}.attention.head_count_kv": kv}
    found[f"{arch}.expert_count"] = experts
    return {key: value for key, value in found.items() if isinstance(value, int | list) and value}
