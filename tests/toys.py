"""Small models and adapters with the names of real ones, made from seeds."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from regraft import Adapter, ModuleRef
from regraft.adapter import MODEL
from regraft.tensors import InMemory
from regraft.updates import LowRank

VOCAB, WIDTH, MLP = 96, 24, 40
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

StateDict = dict[str, Tensor]


def llama(seed: int = 0, *, layers: int = 3, width: int = WIDTH, mlp: int = MLP) -> StateDict:
    """A state dict with Llama's names; weights are Gaussian."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    state = {"model.embed_tokens.weight": weight(VOCAB, width)}
    for i in range(layers):
        block = f"model.layers.{i}"
        state |= {f"{block}.self_attn.{name}.weight": weight(width, width) for name in ATTENTION}
        state |= {f"{block}.mlp.{name}.weight": weight(mlp, width) for name in ("gate_proj", "up_proj")}
        state[f"{block}.mlp.down_proj.weight"] = weight(width, mlp)
        state[f"{block}.input_layernorm.weight"] = torch.ones(width)
    return state | {"model.norm.weight": torch.ones(width), "lm_head.weight": weight(VOCAB, width)}


def drifted(state: StateDict, amount: float, seed: int = 1) -> StateDict:
    """The same model trained on: every matrix moved by ``amount`` of its norm."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        moved[name] = tensor + amount * noise * tensor.norm() / noise.norm() if tensor.dim() > 1 else tensor
    return moved


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def permutation(size: int, seed: int) -> Tensor:
    return torch.eye(size)[torch.randperm(size, generator=torch.Generator().manual_seed(seed))]


def regauged(state: StateDict, residual: Tensor, mlp: Tensor) -> StateDict:
    """The same function in other coordinates: hidden units moved by ``residual`` (w, w) and ``mlp`` (m, m)."""
    out = {}
    for name, w in state.items():
        role = name.split(".")[-2]
        if role in ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj"):
            w = w @ residual.T
        elif role == "o_proj":
            w = residual @ w
        elif role in ("gate_proj", "up_proj"):
            w = mlp @ w @ residual.T
        elif role == "down_proj":
            w = residual @ w @ mlp.T
        out[name] = w.contiguous()
    return out


def save_base(state: StateDict, path: Path) -> Path:
    """A bare weights file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def lora(
    state: StateDict,
    *,
    rank: int = 4,
    roles: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"),
    seed: int = 7,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
    dora: bool = False,
) -> Adapter:
    """A PEFT-style LoRA on the named roles of a state dict."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, weight in state.items():
        path = name.removesuffix(".weight")
        if path.split(".")[-1] not in roles:
            continue
        up = torch.randn(weight.shape[0], rank, generator=generator) * 0.05
        down = torch.randn(rank, weight.shape[1], generator=generator) * 0.05
        magnitude = InMemory(weight.norm(dim=1) * 1.1) if dora else None
        updates[ModuleRef(MODEL, path)] = LowRank(
            InMemory(up.to(dtype)), InMemory(down.to(dtype)), scale, magnitude=magnitude
        )
    return Adapter(updates, "peft")


def deltas(adapter: Adapter) -> dict[ModuleRef, Tensor]:
    """ΔW of every module."""
    return {ref: update.delta() for ref, update in adapter.updates.items() if isinstance(update, LowRank)}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())
