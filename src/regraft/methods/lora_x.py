"""LoRA-X: project the update onto the new weight's own singular subspaces."""

from __future__ import annotations

from torch import Tensor

from regraft.errors import UsageError
from regraft.methods import Outcome, Skip, equal_sizes_only, method
from regraft.methods._directions import directions
from regraft.methods._subspace import MOST_EDGE, Projected, filtered, index_matched, overlap, subspaces
from regraft.transport import Transport


@method(
    "lora-x",
    reference="LoRA-X (Farhadzadeh et al., ICLR 2025, arXiv 2501.16559, eq. 3 and 4, §4.2.2)",
    summary="Keeps the part of the update that lies in the new weight's leading singular subspaces.",
    needs=("new",),
    resizes=True,
    old_for=("threshold",),
)
def lora_x(
    old: Tensor | None,
    new: Tensor,
    *,
    subspace_rank: int | float | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    edge: float | None = None,
) -> Outcome:
    """ΔW_new = U U^T ΔW V V^T (eq. 3) with U (out, r), V (in, r) of the new weight.

    The paper fixes r = 320 for SD 1.5 and SDXL; here r follows the energy of the weight (0.9), unless it is given.

    For another size (§4.2.2), P = argmin ‖P U_s − U_t‖ = U_t U_sᵀ (its inverse read as a pseudo-inverse), so that
    P U_s = U_t: what is carried is U_sᵀ ΔW V_s, the old singular pairs' deltas, to the new pairs of the same index.
    Pairs are ambiguous in sign; `index_matched` says how that is settled. Between bases that are not in fact aligned
    by index, this carries nothing but the size of the update.

    Args:
        old: old weight (out, in); needed for ``threshold`` and other sizes only.
        new: new weight (out', in').
        subspace_rank: r, or a share of the full rank.
        energy: share of ‖W‖² that the subspace holds.
        threshold: least subspace similarity (eq. 4, corrected for chance) at which a module is carried; of one size.
        edge: τ of a soft edge in place of the cut, in root mean squares of W's singular values: U Uᵀ and V Vᵀ become
            W Wᵀ (W Wᵀ + τ² I)⁻¹ and Wᵀ W (Wᵀ W + τ² I)⁻¹. Not of the paper; one Cholesky factor in place of the
            decomposition. At 0.35 about as much of an update is left as at the cut. Equal sizes only.
    """
    if edge is not None:
        if not 0 < edge <= MOST_EDGE:
            raise UsageError(f"--edge {edge} is out of range", remedy=f"Give a number above 0, up to {MOST_EDGE:g}.")
        if any(given is not None for given in (subspace_rank, energy, threshold)):
            raise UsageError("--edge excludes --subspace-rank, --energy and --threshold", remedy="Give one of them.")
        if old is not None and old.shape != new.shape:
            return equal_sizes_only("lora-x with an edge", old, new)
        return filtered(new, edge)
    u, v = directions(new, subspace_rank, energy)
    if old is not None and old.shape != new.shape:
        left, right = u.matrix, v.matrix
        return index_matched(*subspaces(old, left.shape[1], None), left, right)
    if isinstance(threshold, str):
        raise UsageError(f"lora-x has no threshold {threshold!r}", remedy="The paper gives none: give a number.")
    if threshold is not None:
        if old is None:
            raise UsageError("lora-x with --threshold compares both bases", remedy="Give --from.")
        left, right = u.matrix, v.matrix
        u_old, v_old = subspaces(old, left.shape[1], None)
        similarity = (overlap(u_old, left) + overlap(v_old, right)) / 2
        if similarity < threshold:
            return Skip(f"subspace similarity {similarity:.2f} is below the threshold {threshold:g}")
    return Transport() if u.is_whole and v.is_whole else Projected([u], [v])
