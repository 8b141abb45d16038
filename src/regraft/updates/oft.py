"""Orthogonal fine-tuning: blocks of rows (LyCORIS) or columns (PEFT) of the weight are rotated.

OFT (Qiu et al. 2023, arXiv 2306.07280). The rotation of a block is the Cayley transform of a skew matrix:

- LyCORIS 4.1.3 (diag-OFT): Q = oft_blocks − oft_blocksᵀ, R = (I + Q)(I − Q)⁻¹, W' = rescale · Rᵀ W;
- PEFT 0.21.2: Q from its upper triangle, R = (I − Q)(I + Q)⁻¹, or, as its default, the Neumann series of
  (I + Q)(I − Q)⁻¹, which turns the other way; W' = W Rᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import Kind, RowPart, needed


@dataclass(frozen=True)
class Oft(Kind):
    """W' = rescale · Rᵀ W (LyCORIS) or W Rᵀ (PEFT), R block-diagonal and orthogonal.

    Attributes:
        blocks: (n, b, b); in PEFT's convention (n, b (b − 1) / 2), the upper triangles, n = 1 with ``block_share``.
        rescale: a factor per output row, (out, 1, …), of LyCORIS.
        alpha: LyCORIS' constraint: ‖Q‖ of all blocks is held below alpha · out; 0 is none.
        convention: whose.
        terms: PEFT's ``num_cayley_neumann_terms``; None where the Cayley transform is exact.
        eps: PEFT's ``eps`` with ``coft``: ‖Q‖ of each block is held below eps / √n.
        strength: LyCORIS' multiplier, R → strength · R + (1 − strength) · I: no block can hold it.
        weight_shape: shape of the base's weight where it is known.
    """

    blocks: TensorRef
    rescale: TensorRef | None = None
    alpha: TensorRef | None = None
    convention: Literal["lycoris", "peft"] = "lycoris"
    terms: int | None = None
    eps: float | None = None
    strength: float = 1.0
    weight_shape: Shape | None = None

    @property
    def kind(self) -> str:
        return "oft"

    @property
    def shape(self) -> Shape:
        """Shape of ΔW where it is known, else the one axis that the blocks tell."""
        return self.weight_shape or (self.blocks.shape[0] * self.block_size,)

    @property
    def rows(self) -> int | None:
        if self.weight_shape is not None:
            return self.weight_shape[0]
        return self.shape[0] if self.convention == "lycoris" else None

    def fits(self, weight_shape: Shape) -> bool:
        size = self.blocks.shape[0] * self.block_size
        if len(weight_shape) < 2:
            return False
        if self.convention == "lycoris":
            return weight_shape[0] == size
        # One block may serve all columns (PEFT's block_share).
        columns = prod(weight_shape[1:])
        return columns == size or (self.blocks.shape[0] == 1 and columns % size == 0)

    @property
    def additive(self) -> bool:
        return False

    @property
    def block_size(self) -> int:
        size = self.blocks.shape[-1]
        # b (b − 1) / 2 numbers stand above the diagonal.
        return size if self.convention == "lycoris" else round((1 + (1 + 8 * size) ** 0.5) / 2)

    def rotations(self) -> Tensor:
        """R, (n, b, b), float32."""
        stored = self.blocks.load().float()
        if self.convention == "lycoris":
            limit = 0.0 if self.alpha is None else float(self.alpha.load())
            return cayley(constrained(stored - stored.mT, limit * stored.shape[0] * stored.shape[1]))
        upper = torch.zeros(len(stored), self.block_size, self.block_size)
        rows, columns = torch.triu_indices(self.block_size, self.block_size, 1)
        upper[:, rows, columns] = stored
        skew = upper - upper.mT
        if self.eps is not None:
            limits = self.eps / len(stored) ** 0.5 / skew.norm(dim=(1, 2), keepdim=True)
            skew = skew * limits.clamp(max=1.0)
        return cayley(-skew) if self.terms is None else neumann(skew, self.terms)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        base = needed(weight, self.kind)
        rotation = self.rotations()
        n, size = rotation.shape[:2]
        rotation = self.strength * rotation + (1 - self.strength) * torch.eye(size)
        if self.convention == "peft":
            columns = base.reshape(len(base), -1, size)
            shared = rotation.expand(columns.shape[1], size, size)
            return torch.einsum("onk,njk->onj", columns, shared).reshape(base.shape) - base
        moved = torch.einsum("nij,ni...->nj...", rotation, base.reshape(n, size, *base.shape[1:])).reshape(base.shape)
        return rescaled(moved, self.rescale) - base

    def scaled(self, strength: float) -> Oft:
        return self if strength == 1.0 else replace(self, strength=self.strength * strength)

    def row_parts(self) -> dict[str, RowPart] | None:
        if self.convention == "peft":
            return {}
        if self.alpha is not None and float(self.alpha.load()) > 0:
            # The constraint holds the norm of all blocks together.
            return None
        rescale = {} if self.rescale is None else {"rescale": RowPart(0)}
        return {"blocks": RowPart(0, self.block_size), **rescale}


def cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹ of skew matrices, (…, b, b)."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    result: Tensor = torch.linalg.solve(identity - skew, identity + skew, left=False)
    return result


def constrained(skew: Tensor, limit: float) -> Tensor:
    """Q, scaled down to the norm ``limit`` where it is longer; a limit of 0 is none (LyCORIS)."""
    norm = skew.norm() + 1e-8
    return skew * (limit / norm) if 0 < limit < float(norm) else skew


def neumann(skew: Tensor, terms: int) -> Tensor:
    """PEFT's series for (I + Q)(I − Q)⁻¹: I + 2Q + 2Q² + … + Qᵗ⁻¹; three terms are computed as four."""
    result, power = torch.eye(skew.shape[-1]).expand_as(skew), skew
    if terms < 2:
        return result
    for _ in range(1 if terms == 2 else max(terms, 4) - 2):
        result = result + 2.0 * power
        power = power @ skew
    return result if terms == 2 else result + power


def rescaled(rows: Tensor, rescale: TensorRef | None) -> Tensor:
    """Each row times its factor, where there are any."""
    return rows if rescale is None else rows * rescale.load().float().reshape(-1, *[1] * (rows.dim() - 1))
