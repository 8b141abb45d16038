"""ProLoRA: subspace part and null-space part, each projected onto its own counterpart."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.methods import Outcome, Skip, method
from regraft.methods._subspace import overlap, subspaces
from regraft.transport import LinearMap, Transport


@method(
    "prolora",
    reference="ProLoRA (Farhadzadeh et al., ICML 2025, arXiv 2506.04244)",
    summary="Carries the part inside the weights' subspaces and the part outside apart; same size only.",
    needs=("old", "new"),
)
def prolora(
    old: Tensor,
    new: Tensor,
    *,
    subspace_rank: int | float | None = None,
    energy: float | None = None,
    threshold: float | None = None,
) -> Outcome:
    """ΔW_new = P_t P_s ΔW Q_s Q_t + (I − P_t)(I − P_s) ΔW (I − Q_s)(I − Q_t); the cross parts are dropped.

    P = U Uᵀ and Q = V Vᵀ are the projections on the singular subspaces of old (s) and new (t) weight; both of one
    rank. The paper carries modules with Φ ≥ 0.8; here all are, unless ``threshold`` is given.

    Args:
        old: old weight (out, in).
        new: new weight (out, in).
        subspace_rank: rank of the subspaces, or a share of the full rank.
        energy: share of ‖W‖² that the old weight's subspace holds.
        threshold: least chance-corrected overlap of the subspaces at which a module is carried.
    """
    u_old, v_old = subspaces(old, subspace_rank, energy)
    u_new, v_new = subspaces(new, u_old.shape[1], None)
    if threshold is not None:
        similarity = (overlap(u_old, u_new) + overlap(v_old, v_new)) / 2
        if similarity < threshold:
            return Skip(f"subspace similarity {similarity:.2f} is below the threshold {threshold:g}")
    inside = (_both_inside(u_new, u_old), _both_inside(v_old, v_new))
    outside = (_both_outside(u_new, u_old), _both_outside(v_old, v_new))
    return Transport((inside, outside))


def _both_inside(a: Tensor, b: Tensor) -> LinearMap:
    """A Aᵀ B Bᵀ."""
    return LinearMap(0.0, a @ (a.T @ b), b.T)


def _both_outside(a: Tensor, b: Tensor) -> LinearMap:
    """(I − A Aᵀ)(I − B Bᵀ) = I − A Aᵀ − B Bᵀ + A AᵀB Bᵀ, as one thin product."""
    left = torch.cat([a, b], dim=1)
    right = torch.cat([(a.T @ b) @ b.T - a.T, -b.T], dim=0)
    return LinearMap(1.0, left, right)
