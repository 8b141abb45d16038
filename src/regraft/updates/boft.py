"""Butterfly OFT: the weight is rotated by a product of sparse rotations (Liu et al. 2023, arXiv 2311.06243).

LyCORIS 4.1.3: stage i mixes rows that lie 2ⁱ · b / 2 apart, by the Cayley transforms of its (n, b, b) blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import Kind, needed
from regraft.updates.oft import cayley, constrained


@dataclass(frozen=True)
class Boft(Kind):
    """W' = rescale · (R_m … R_1) W.

    Attributes:
        blocks: (m, n, b, b): m stages of n blocks.
        rescale: a factor per output row, (out, 1, …).
        alpha: LyCORIS' constraint, as in `Oft`.
        strength: LyCORIS' multiplier, each stage's R → strength · R + (1 − strength) · I.
        weight_shape: shape of the base's weight where it is known.
    """

    blocks: TensorRef
    rescale: TensorRef | None = None
    alpha: TensorRef | None = None
    strength: float = 1.0
    weight_shape: Shape | None = None

    @property
    def kind(self) -> str:
        return "boft"

    @property
    def shape(self) -> Shape:
        """Shape of ΔW where it is known, else (out,)."""
        return self.weight_shape or (self.blocks.shape[1] * self.blocks.shape[2],)

    @property
    def additive(self) -> bool:
        return False

    def rotations(self) -> Tensor:
        """R of every block of every stage, (m, n, b, b), float32."""
        stored = self.blocks.load().float()
        limit = 0.0 if self.alpha is None else float(self.alpha.load())
        return cayley(constrained(stored - stored.mT, limit * stored.shape[1] * stored.shape[2]))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        base = needed(weight, self.kind)
        identity, moved = torch.eye(self.blocks.shape[-1]), base.flatten(1)
        for stage, rotation in enumerate(self.rotations()):
            mixed = self.strength * rotation + (1 - self.strength) * identity
            moved = _stage(moved, mixed, 2**stage * mixed.shape[-1] // 2)
        moved = moved.reshape(base.shape)
        if self.rescale is not None:
            moved = moved * self.rescale.load().float().reshape(-1, *[1] * (base.dim() - 1))
        return moved - base

    def scaled(self, strength: float) -> Boft:
        return self if strength == 1.0 else replace(self, strength=self.strength * strength)


def _stage(rows: Tensor, rotation: Tensor, apart: int) -> Tensor:
    """One butterfly stage on (out, in): neighbours ``apart`` rows away are brought together, rotated, and put back."""
    paired = rows.reshape(-1, 2, apart, rows.shape[1]).transpose(1, 2).reshape(len(rotation), -1, rows.shape[1])
    turned = torch.einsum("nij,njk->nik", rotation, paired)
    return turned.reshape(-1, apart, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
