"""Attention heads of two models against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.base import Base


@dataclass(frozen=True)
class HeadCounts:
    """Of one model.

    Attributes:
        queries: heads.
        keys: heads of keys and values; fewer where queries are grouped.
        size: of a head.
    """

    queries: int
    keys: int
    size: int


def head_counts(base: Base, component: str, out_features: int) -> HeadCounts | None:
    """From the base's config; None where it says nothing.

    Args:
        base: with configs.
        component: of the model.
        out_features: of its query projection.
    """
    config = base.configs.get(component, {})
    queries = config.get("num_attention_heads")
    if not isinstance(queries, int) or queries < 1 or out_features % queries:
        return None
    keys = config.get("num_key_value_heads") or queries
    return HeadCounts(queries, int(keys), out_features // queries)


@dataclass(frozen=True)
class Heads:
    """The weights of one attention, each per query head.

    Attributes:
        q, k, v: (heads, size, h).
        o: (heads, h, size).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def split_heads(projections: Sequence[Tensor], counts: HeadCounts) -> Heads:
    """q, k, v (out, h) and o (h, out) by head; keys and values repeated for the queries that share them."""
    q, k, v, o = projections
    repeats = counts.queries // counts.keys
    by_head = [weight.reshape(-1, counts.size, weight.shape[1]) for weight in (q, k, v)]
    k, v = (weight.repeat_interleave(repeats, dim=0) for weight in by_head[1:])
    return Heads(by_head[0], k, v, o.reshape(o.shape[0], counts.queries, counts.size).transpose(0, 1))


def head_similarity(old: Heads, new: Heads, width: Tensor) -> Tensor:
    """Cosine of every two heads' [W_xᵀ QᵀK W_x ; W_xᵀ VᵀOᵀ W_x], (old heads, new heads), without building them.

    Args:
        old: heads of the old model, h wide.
        new: of the new one, h' wide.
        width: W_x, (h, h').
    """

    def products(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        # ⟨A₁ᵀB₁, A₂ᵀB₂⟩ = Σ (A₁A₂ᵀ) ∘ (B₁B₂ᵀ), of two heads' (size, h') factors.
        one, other = (torch.einsum("ish,jth->ijst", x, y) for x, y in zip(a, b, strict=True))
        return (one * other).sum(dim=(2, 3))

    moved = [(old.q @ width, old.k @ width), (old.v @ width, old.o.transpose(1, 2) @ width)]
    there = [(new.q, new.k), (new.v, new.o.transpose(1, 2))]
    cross = sum((products(a, b) for a, b in zip(moved, there, strict=True)), torch.zeros(()))
    norms = [sum((products(a, a).diagonal() for a in side), torch.zeros(())).sqrt() for side in (moved, there)]
    result: Tensor = cross / (norms[0][:, None] * norms[1][None, :]).clamp_min(1e-30)
    return result


def match_heads(similarity: Tensor) -> list[int]:
    """The old head of every new one, with the highest sum of similarities (Hungarian); −1 for none left."""
    from scipy.optimize import linear_sum_assignment

    olds, news = linear_sum_assignment(-similarity.double().numpy())
    found = [-1] * similarity.shape[1]
    for old, new in zip(olds.tolist(), news.tolist(), strict=True):
        found[new] = old
    return found


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two feature matrices over the same n rows, (n, p) and (n, q) (Kornblith et al. 2019, eq. 3)."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    norms = float((x.T @ x).norm()) * float((y.T @ y).norm())
    return float((x.T @ y).square().sum()) / norms if norms > 0 else 0.0
