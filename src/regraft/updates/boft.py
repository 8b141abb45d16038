"""Butterfly OFT: the weight is rotated by a product of sparse rotations (Liu et al. 2023, arXiv 2311.06243).

Stage i mixes neighbours that lie 2ⁱ · b / 2 apart, by the Cayley transforms of its (n, b, b) blocks:

- LyCORIS 4.1.3: rows of the weight, Q = oft_blocks − oft_blocksᵀ, R = (I + Q)(I − Q)⁻¹;
- PEFT 0.21.2: columns, Q = (boft_R − boft_Rᵀ) / 2, R = (I − Q)(I + Q)⁻¹, and chunks of b / 2 columns in place of
  single rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import Kind, RowPart, needed
from regraft.updates.oft import cayley, constrained, rescaled


@dataclass(frozen=True)
class Boft(Kind):
    """W' = rescale · (R_m … R_1) W (LyCORIS) or rescale · W (R_m … R_1)ᵀ (PEFT).

    Attributes:
        blocks: (m, n, b, b): m stages of n blocks.
        rescale: a factor per output row, (out, 1, …), (1, out) in PEFT's convolutions.
        alpha: LyCORIS' constraint, as in `Oft`.
        convention: whose.
        strength: LyCORIS' multiplier, each stage's R → strength · R + (1 − strength) · I.
        weight_shape: shape of the base's weight where it is known.
    """

    blocks: TensorRef
    rescale: TensorRef | None = None
    alpha: TensorRef | None = None
    convention: Literal["lycoris", "peft"] = "lycoris"
    strength: float = 1.0
    weight_shape: Shape | None = None

    @property
    def kind(self) -> str:
        return "boft"

    @property
    def shape(self) -> Shape:
        """Shape of ΔW where it is known, else the one axis that the blocks tell."""
        return self.weight_shape or (self.blocks.shape[1] * self.blocks.shape[2],)

    @property
    def rows(self) -> int | None:
        if self.weight_shape is not None:
            return self.weight_shape[0]
        if self.convention == "peft":
            return None if self.rescale is None else prod(self.rescale.shape)
        return self.shape[0]

    def fits(self, weight_shape: Shape) -> bool:
        size = self.blocks.shape[1] * self.blocks.shape[2]
        if len(weight_shape) < 2:
            return False
        if self.convention == "lycoris":
            return weight_shape[0] == size
        return prod(weight_shape[1:]) == size and self.rows in (None, weight_shape[0])

    @property
    def additive(self) -> bool:
        return False

    def rotations(self) -> Tensor:
        """R of every block of every stage, (m, n, b, b), float32."""
        stored = self.blocks.load().float()
        if self.convention == "peft":
            return cayley(0.5 * (stored.mT - stored))
        limit = 0.0 if self.alpha is None else float(self.alpha.load())
        return cayley(constrained(stored - stored.mT, limit * stored.shape[1] * stored.shape[2]))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        base = needed(weight, self.kind)
        identity, flat = torch.eye(self.blocks.shape[-1]), base.flatten(1)
        moved = flat if self.convention == "lycoris" else flat.T
        for stage, rotation in enumerate(self.rotations()):
            mixed = self.strength * rotation + (1 - self.strength) * identity
            moved = self._stage(moved, mixed, 2**stage)
        turned = moved if self.convention == "lycoris" else moved.T
        return rescaled(turned.reshape(base.shape), self.rescale) - base

    def _stage(self, rows: Tensor, rotation: Tensor, stride: int) -> Tensor:
        """One stage on (n · b, k): neighbours are brought together, rotated, and put back."""
        half, width = rotation.shape[-1] // 2, rows.shape[1]
        # LyCORIS pairs single rows half a block times the stride apart; PEFT sorts chunks of half a block.
        grid = (2, stride * half, 1) if self.convention == "lycoris" else (2, stride, half)
        if self.convention == "peft" and stride == 1:
            # One chunk after the other as they are: a block of one stage may be odd.
            grid = (1, 1, 1)
        paired = rows.reshape(-1, *grid, width).transpose(1, 2).reshape(len(rotation), -1, width)
        turned = torch.einsum("nij,njk->nik", rotation, paired)
        return turned.reshape(-1, grid[1], grid[0], grid[2], width).transpose(1, 2).reshape(rows.shape)

    def scaled(self, strength: float) -> Boft:
        return self if strength == 1.0 else replace(self, strength=self.strength * strength)

    def row_parts(self) -> dict[str, RowPart] | None:
        if self.convention == "lycoris":
            return None
        if self.rescale is None:
            return {}
        return {"rescale": RowPart(1 if self.rescale.shape[0] == 1 and len(self.rescale.shape) > 1 else 0)}
