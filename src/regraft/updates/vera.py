"""VeRA: a pair of fixed random matrices for all modules, and two trained vectors for each (Kopiczko et al. 2024).

arXiv 2310.11454, eq. 2: ΔW = diag(b) B diag(d) A. In PEFT 0.21.2 A and B have the size of the largest module, and every
other takes their first columns and rows. They lie in the file, or (``save_projection`` off) are drawn from a seed:
Kaiming-uniform, A first, by one generator on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from regraft.tensors import InMemory, Shape, TensorRef
from regraft.updates._by_shape import ByShape
from regraft.updates._kind import bare, fitted, low_rank_norm, scaled_ref
from regraft.updates._views import Cast

#: Why a change can't be told.
UNDRAWN = "its random projections are not in its file, and not every module is there that tells their size"
#: No VeRA has such a rank: its projections would be larger than the model.
HIGHEST_RANK = 1 << 14


class Seed(NamedTuple):
    """What projections that no file holds are drawn from.

    Attributes:
        key: of the generator.
        modules: how many modules the file has: the largest of all tells the projections' size.
    """

    key: int
    modules: int


@dataclass(frozen=True)
class Vera(ByShape):
    """ΔW = diag(lambda_b) B[:out] diag(lambda_d) A[:, :in].

    Attributes:
        lambda_b: (out,).
        lambda_d: (r,).
        a: (r, in or more), shared by all modules of a file; None until it is drawn.
        b: (out or more, r), likewise.
        seed: what both are drawn from, where the file does not hold them.
        orientation: ``conv1d`` where the base's weight is (in, out).
        weight_shape: shape of the base's weight where it is known; ΔW is told by nothing less.
    """

    lambda_b: TensorRef
    lambda_d: TensorRef
    a: TensorRef | None
    b: TensorRef | None
    seed: Seed | None = None
    orientation: Literal["weight", "conv1d"] = "weight"
    weight_shape: Shape | None = None

    @property
    def kind(self) -> str:
        return "vera"

    @property
    def rank(self) -> int:
        return self.lambda_d.shape[0]

    @property
    def shape(self) -> Shape:
        """Shape of ΔW where it is known, else (out,)."""
        return self.weight_shape or self.lambda_b.shape

    @property
    def additive(self) -> bool:
        return self.weight_shape is not None and self.a is not None

    def fits(self, weight_shape: Shape) -> bool:
        if self.weight_shape is not None:
            return super().fits(weight_shape)
        if len(bare(weight_shape)) != 2:
            return False
        out, into = self._sides_of(weight_shape)
        return out == self.lambda_b.shape[0] and (self.a is None or into <= self.a.shape[1])

    def factors(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """diag(lambda_b) B[:out] and diag(lambda_d) A[:, :in], float32, (out, r) and (r, in) of the layer.

        Raises:
            ValueError: the weight's shape, or the largest module's, is not known.
        """
        out, into = self.sides(weight)
        if self.a is None or self.b is None:
            raise ValueError(f"the change of a vera update can't be told: {UNDRAWN}")
        up = self.lambda_b.load().float()[:, None] * self.b.load()[:out].float()
        down = self.lambda_d.load().float()[:, None] * self.a.load()[:, :into].float()
        return up, down

    def delta(self, weight: Tensor | None = None) -> Tensor:
        up, down = self.factors(weight)
        change = up @ down
        change = change.T if self.orientation == "conv1d" else change
        return fitted(change if self.weight_shape is None else change.reshape(self.weight_shape), weight)

    def norm(self, weight: Tensor | None = None) -> float:
        """‖ΔW‖_F through r × r Gram matrices: ΔW itself is never built."""
        return low_rank_norm(*self.factors(weight))

    def scaled(self, strength: float) -> Vera:
        return self if strength == 1.0 else replace(self, lambda_b=scaled_ref(self.lambda_b, strength))

    def cast(self, dtype: torch.dtype) -> Vera:
        # A copy of the projections for each module would take more memory than the model.
        a, b = (None if ref is None else Cast(ref, dtype) for ref in (self.a, self.b))
        lambda_b, lambda_d = (InMemory(ref.load().to(dtype)) for ref in (self.lambda_b, self.lambda_d))
        return replace(self, lambda_b=lambda_b, lambda_d=lambda_d, a=a, b=b)


def projections(key: int, rank: int, out: int, into: int) -> tuple[InMemory, InMemory]:
    """A (r, in) and B (out, r) as PEFT draws them, bit for bit, float32.

    Args:
        key: ``projection_prng_key``.
        rank: r.
        out: the most outputs of all modules.
        into: the most inputs.
    """
    generator = torch.Generator().manual_seed(key)

    def uniform(rows: int, columns: int) -> InMemory:
        # Kaiming for a gain of √2: bound √3 · √2 / √(columns), rounded in this order.
        bound = sqrt(3.0) * (sqrt(2) / sqrt(columns))
        return InMemory(torch.empty(rows, columns).uniform_(-bound, bound, generator=generator))

    return uniform(rank, into), uniform(out, rank)
