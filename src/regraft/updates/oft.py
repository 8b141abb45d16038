"""Orthogonal fine-tuning: blocks of rows (LyCORIS) or columns (PEFT) of the weight are rotated.

OFT (Qiu et al. 2023, arXiv 2306.07280). The rotation of a block is the Cayley transform of a skew matrix:

- LyCORIS 4.1.3 (diag-OFT): Q = oft_blocks − oft_blocksᵀ, R = (I + Q)(I − Q)⁻¹, W' = rescale · Rᵀ W;
- PEFT 0.21.2: Q from its upper triangle, R = (I + Q)⁻¹-form (I − Q) or its Neumann series, W' = W Rᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import Kind, RowPart, needed


@dataclass(frozen=True)
class Oft(Kind):
    """W' = rescale · Rᵀ W (LyCORIS) or W Rᵀ (PEFT), R block-diagonal and orthogonal.

    Attributes:
        blocks: (n, b, b); in PEFT's convention (n, b (b − 1) / 2), the upper triangles.
        rescale: a factor per output row, (out, 1, …), of LyCORIS.
        alpha: LyCORIS' constraint: ‖Q‖ is held below alpha · out; 0 is none.
        convention: whose.
        terms: PEFT's number of Neumann terms; None where the Cayley transform is exact.
        strength: LyCORIS' multiplier, R → strength · R + (1 − strength) · I: no block can hold it.
        weight_shape: shape of the base's weight where it is known.
    """

    blocks: TensorRef
    rescale: TensorRef | None = None
    alpha: TensorRef | None = None
    convention: Literal["lycoris", "peft"] = "lycoris"
    terms: int | None = None
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
        identity = torch.eye(self.block_size)
        if self.convention == "lycoris":
            limit = 0.0 if self.alpha is None else float(self.alpha.load())
            return cayley(constrained(stored - stored.mT, limit * stored.shape[0] * stored.shape[1]))
        upper = torch.zeros(stored.shape[0], self.block_size, self.block_size)
        rows, columns = torch.triu_indices(self.block_size, self.block_size, 1)
        upper[:, rows, columns] = stored
        skew = upper - upper.mT
        if self.terms is None:
            return cayley(-skew)
        return neumann(skew, self.terms, identity)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        base = needed(weight, self.kind)
        rotation = self.rotations()
        n, size = rotation.shape[:2]
        rotation = self.strength * rotation + (1 - self.strength) * torch.eye(size)
        if self.convention == "peft":
            columns = base.reshape(len(base), -1, size)
            # One block may serve all columns (PEFT's block_share).
            shared = rotation.expand(columns.shape[1], size, size)
            return torch.einsum("onk,njk->onj", columns, shared).reshape(base.shape) - base
        moved = torch.einsum("nij,ni...->nj...", rotation, base.reshape(n, size, *base.shape[1:])).reshape(base.shape)
        if self.rescale is not None:
            moved = moved * self.rescale.load().float().reshape(-1, *[1] * (base.dim() - 1))
        return moved - base

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


def neumann(skew: Tensor, terms: int, identity: Tensor) -> Tensor:
    """PEFT's series for (I + Q)(I − Q)⁻¹: I + 2Q + 2Q² + … + Qᵗ⁻¹, the last term once."""
    result, power = identity.expand_as(skew).clone(), skew
    for term in range(1, terms):
        result = result + (1.0 if term == terms - 1 and terms > 2 else 2.0) * power
        power = power @ skew
    return result
