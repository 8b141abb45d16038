"""Updates of one kind as another: exactly where that can be, and by a truncated SVD where it can't."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from regraft.tensors import InMemory, Shape, TensorRef
from regraft.updates._kind import is_per_column
from regraft.updates.diff import Diff
from regraft.updates.foura import Foura
from regraft.updates.fourierft import FourierFT
from regraft.updates.loha import LoHa
from regraft.updates.lokr import LoKr
from regraft.updates.lowrank import LowRank
from regraft.updates.rows import Slice, take_rows
from regraft.updates.tucker import Tucker
from regraft.updates.vera import Vera

if TYPE_CHECKING:
    from regraft.updates import Update


class Refactored(NamedTuple):
    """A low-rank approximation of a change.

    Attributes:
        update: of float32 factors, scale 1.
        energy_kept: the share of ‖ΔW‖² that it holds.
    """

    update: LowRank
    energy_kept: float


def as_lowrank(update: Update, *, dense: bool = False) -> LowRank | None:
    """The same change as a LoRA (DoRA's magnitude included), in float32 factors; None where no low rank holds it.

    A Tucker LoRA keeps its rank, a FouRA that of its open directions; LoHa has rank r₁ · r₂; LoKr that of its halves'
    product, at most the weight's; VeRA its own, at most the weight's.

    Args:
        update: any. `LoHa` and `LoKr` that flatten a kernel need their ``weight_shape`` to give a convolution's LoRA,
            `Vera` and `FourierFT` theirs to give any.
        dense: give a `Diff` and a `FourierFT` too, at the weight's full rank.
    """
    if isinstance(update, LowRank):
        return update
    if isinstance(update, Tucker):
        return _tucker(update)
    if isinstance(update, Foura):
        return update.as_lowrank()
    if isinstance(update, LoHa):
        return _loha(update)
    if isinstance(update, LoKr):
        return _lokr(update)
    if isinstance(update, Vera):
        return _vera(update) if update.additive else None
    if isinstance(update, FourierFT) and dense and update.additive:
        made = _lowrank(*_trivial(update.delta().flatten(1)), update.shape, 1.0)
        return replace(made, orientation=update.orientation)
    if isinstance(update, Diff) and dense and len(update.shape) > 1:
        up, down = _trivial(update.value.load().float().flatten(1))
        return _lowrank(up, down, update.shape, 1.0)
    if isinstance(update, Slice):
        whole = as_lowrank(update.of, dense=dense)
        part = None if whole is None else take_rows(whole, update.ranges)
        # Magnitudes of columns take every row: such a part stays a slice.
        return part if isinstance(part, LowRank) else None
    return None


def is_factored(update: Update) -> bool:
    """Whether `as_lowrank` gives a LoRA of it; told without reading a tensor."""
    if isinstance(update, Slice):
        per_column = update.magnitude is not None and is_per_column(update.magnitude.shape)
        return is_factored(update.of) and not per_column
    return isinstance(update, LowRank | Tucker | LoHa | LoKr | Foura) or (isinstance(update, Vera) and update.additive)


def _tucker(update: Tucker) -> LowRank:
    mid, _, in_factor = update.factors()
    down = torch.einsum("ij...,jq->iq...", mid, in_factor)
    return LowRank(update.up, InMemory(down), update.scale, update.alpha, update.magnitude)


def _vera(update: Vera) -> LowRank:
    shape = update.shape
    if update.rank > min(shape[0], prod(shape[1:])):
        return replace(_lowrank(*_trivial(update.delta().flatten(1)), shape, 1.0), orientation=update.orientation)
    up, down = update.factors()
    if update.orientation == "conv1d":
        up, down = down.T, up.T
    return replace(_lowrank(up, down, shape, 1.0), orientation=update.orientation)


def _loha(update: LoHa) -> LowRank:
    """(A₁B₁) ∘ (A₂B₂) = A B: A holds the products of A₁'s and A₂'s columns, B those of B₁'s and B₂'s rows."""
    (up1, down1), (up2, down2) = (_half(update, number) for number in (1, 2))
    up = torch.einsum("oi,oj->oij", up1, up2).flatten(1)
    down = torch.einsum("ic,jc->ijc", down1, down2).flatten(0, 1)
    alpha = None if update.alpha is None else _alpha(update.scale * up.shape[1])
    return _lowrank(up, down, update.shape, update.scale, alpha, update.magnitude)


def _half(update: LoHa, number: int) -> tuple[Tensor, Tensor]:
    """(out, r) and (r, in · kh · kw) of one half."""
    a, b, t = (update.w1_a, update.w1_b, update.t1) if number == 1 else (update.w2_a, update.w2_b, update.t2)
    if t is None:
        return a.load().float(), b.load().float().flatten(1)
    core = torch.einsum("ij...,jq->iq...", t.load().float(), b.load().float())
    return a.load().float().T, core.flatten(1)


def _lokr(update: LoKr) -> LowRank:
    """(U₁V₁) ⊗ (U₂V₂) = (U₁ ⊗ U₂)(V₁ ⊗ V₂)."""
    up1, down1 = _pair(update.w1_a, update.w1_b) or _trivial(update.first())
    low = _pair(update.w2_a, update.w2_b) if update.t2 is None else None
    if update.t2 is not None:
        assert update.w2_a is not None
        assert update.w2_b is not None
        core = torch.einsum("ij...,jq->iq...", update.t2.load().float(), update.w2_b.load().float())
        low = update.w2_a.load().float().T.contiguous(), core.flatten(1)
    up2, down2 = low or _trivial(update.second().flatten(1))
    rank, shape = up1.shape[1] * up2.shape[1], update.shape
    if rank > min(shape[0], prod(shape[1:])):
        up, down = _trivial(update.delta().flatten(1) / update.scale)
    else:
        up, down = torch.kron(up1, up2), torch.kron(down1, down2)
    alpha = None if update.alpha is None else _alpha(update.scale * up.shape[1])
    return _lowrank(up, down, shape, update.scale, alpha, update.magnitude)


def _pair(a: TensorRef | None, b: TensorRef | None) -> tuple[Tensor, Tensor] | None:
    return None if a is None or b is None else (a.load().float(), b.load().float().flatten(1))


def _trivial(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix as a product with an identity, on its shorter side."""
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.eye(matrix.shape[0]), matrix
    return matrix, torch.eye(matrix.shape[1])


def _alpha(value: float) -> TensorRef:
    return InMemory(torch.tensor(value))


def _lowrank(
    up: Tensor,
    down: Tensor,
    shape: Shape,
    scale: float,
    alpha: TensorRef | None = None,
    magnitude: TensorRef | None = None,
) -> LowRank:
    rank, tail = up.shape[1], [1] * (len(shape) - 2)
    up, down = up.reshape(shape[0], rank, *tail).contiguous(), down.reshape(rank, *shape[1:]).contiguous()
    return LowRank(InMemory(up), InMemory(down), scale, alpha, magnitude)


def refactor(
    delta: Tensor, *, energy: float | None = None, rank: int | None = None, double: bool = False
) -> Refactored:
    """A LoRA of a dense change, by truncated SVD.

    Args:
        delta: ΔW, (out, in, …).
        energy: the share of ‖ΔW‖² to keep, 0 to 1; with ``rank`` too, whichever comes to the lower rank.
        rank: the rank at most. Without either, the numerical rank.
        double: compute in float64.
    """
    matrix = delta.to(torch.float64 if double else torch.float32).flatten(1)
    u, s, v = _svd(matrix)
    # What lies below the rounding of the stored change is no rank of it.
    noise = torch.finfo(delta.dtype if delta.is_floating_point() else matrix.dtype).eps * max(matrix.shape)
    return _truncated(u, s, v, tuple(delta.shape), energy, rank, noise)


# From this size on, a matrix twice as long as it is short is decomposed through its Gram matrix: 6 times as fast.
_GRAM_FROM = 256


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced SVD: u (m, k), s (k,), v (k, n)."""
    short, long = sorted(matrix.shape)
    if matrix.dtype != torch.float32 or matrix.device.type == "mps" or short < _GRAM_FROM or long < 2 * short:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, v
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = _svd(matrix.T)
        return u.T, s, v.T
    # Squaring costs half of float64's digits: what is left is what float32 values have.
    exact = matrix.double()
    squares, vectors = torch.linalg.eigh(exact @ exact.T)
    s, u = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    s = torch.where(s > s[0] * torch.finfo(torch.float32).eps, s, torch.zeros_like(s))
    return u, s, (u.T @ exact) / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]


def _truncated(
    u: Tensor, s: Tensor, v: Tensor, shape: Shape, energy: float | None, rank: int | None, noise: float
) -> Refactored:
    """The leading part of an SVD; singular values below ``noise`` times the largest count as zeros."""
    squares = s.double().square()
    total = float(squares.sum())
    keep = max(1, int((s > s[0] * noise).sum()))
    if energy is not None and total > 0:
        reached = min(len(s), int((squares.cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1)
        # Many values that count as zeros one by one may hold more than the energy lets go.
        short = float(squares[:keep].sum()) < energy * total * (1 - 1e-6)
        keep = reached if short else min(keep, reached)
    keep = min(keep, rank) if rank is not None else keep
    root = s[:keep].sqrt()
    update = _lowrank((u[:, :keep] * root).float(), (root[:, None] * v[:keep]).float(), shape, 1.0)
    return Refactored(update, float(squares[:keep].sum()) / total if total > 0 else 1.0)
