"""Least squares with a prior, from second moments; and cuts to a rank in the metric of the inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.transport import cut, rank_for_energy


@dataclass
class Moments:
    """What a module's least-squares problem is made of, summed up batch by batch.

    Wanted: the Δ (out, in) with Δ x ≈ r for the rows' inputs x and wanted changes r of the output.

    Attributes:
        gram: Σ x xᵀ, (in, in).
        cross: Σ r xᵀ, (out, in).
        square: Σ ‖r‖².
    """

    gram: Tensor
    cross: Tensor
    square: float = 0.0

    @classmethod
    def of(cls, out: int, inp: int) -> Moments:
        return cls(torch.zeros(inp, inp, dtype=torch.float64), torch.zeros(out, inp, dtype=torch.float64))

    def add(self, x: Tensor, r: Tensor) -> None:
        """Rows x (N, in), r (N, out)."""
        self.gram += (x.T @ x).to("cpu", torch.float64)
        self.cross += (r.T @ x).to("cpu", torch.float64)
        self.square += float(torch.linalg.vector_norm(r)) ** 2

    def metric(self, ridge: float) -> Tensor:
        """Σ x xᵀ + λ I, with λ = ridge · mean of the diagonal."""
        size = self.gram.diagonal().mean().clamp_min(1e-30)
        added: Tensor = ridge * size * torch.eye(len(self.gram), dtype=torch.float64)
        return self.gram + added

    def solve(self, prior: Tensor, ridge: float) -> Tensor:
        """argmin ‖Δ X − R‖² + λ ‖Δ − prior‖²: prior + (R Xᵀ − prior X Xᵀ)(X Xᵀ + λ I)⁻¹."""
        prior = prior.double()
        rest = self.cross - prior @ self.gram
        solved: Tensor = torch.linalg.solve(self.metric(ridge), rest, left=False)
        return prior + solved

    def left(self, delta: Tensor) -> float:
        """‖Δ X − R‖²."""
        delta = delta.double()
        return float(((delta @ self.gram) * delta).sum() - 2 * (delta * self.cross).sum()) + self.square


def square_root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """M^½ and M^−½ of a positive matrix."""
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(values[-1].clamp_min(1e-30) * 1e-12).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def cut_in(delta: Tensor, rank: int | float, metric: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Reduced-rank regression: the Δ' of a lower rank that is nearest to Δ in ‖(Δ' − Δ) M^½‖.

    Args:
        delta: (out, in).
        rank: a number, or the share of ‖Δ M^½‖² to keep.
        metric: M (in, in), of the inputs; None for the identity, which is a plain truncated SVD.

    Returns:
        Factors (out, r) and (r, in) of even norm, and the share of ‖Δ‖² that was cut off.
    """
    delta = delta.double()
    root, inverse = square_root(metric) if metric is not None else (None, None)
    u, s, vh = torch.linalg.svd(delta if root is None else delta @ root, full_matrices=False)
    if isinstance(rank, float):
        rank = rank_for_energy(s, rank)
    up, down = u[:, :rank] * s[:rank], vh[:rank]
    down = down if inverse is None else down @ inverse
    if up.shape[1] < rank:
        pad = rank - up.shape[1]
        up, down = torch.nn.functional.pad(up, (0, pad)), torch.nn.functional.pad(down, (0, 0, 0, pad))
    # The same product, the singular values shared evenly between the factors.
    up, down = cut(up, down, rank)
    total = float(delta.square().sum())
    lost = float((delta - up @ down).square().sum()) / total if total > 0 else 0.0
    return up.float(), down.float(), lost
