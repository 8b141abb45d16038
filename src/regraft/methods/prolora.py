"""ProLoRA: subspace part and null-space part, each projected onto its own counterpart."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.methods import Fit, Outcome, Skip, WeightPairs, equal_sizes_only, method
from regraft.methods._directions import directions
from regraft.methods._layers import grids
from regraft.methods._subspace import Projected, overlap, phi

#: The paper's, on Φ as it stands, not corrected for chance.
PAPER_THRESHOLD = 0.8


@method(
    "prolora",
    reference="ProLoRA (Farhadzadeh et al., ICML 2025, arXiv 2506.04244)",
    summary="Carries the part inside the weights' subspaces and the part outside apart; same size only.",
    needs=("old", "new"),
    per="pair",
)
def prolora(
    pairs: WeightPairs,
    *,
    subspace_rank: int | float | None = None,
    energy: float | None = None,
    threshold: float | Literal["paper"] | None = None,
    layers: Literal["paired", "all"] = "paired",
) -> Fit:
    """ΔW_new = P_t P_s ΔW Q_s Q_t + (I − P_t)(I − P_s) ΔW (I − Q_s)(I − Q_t); the cross parts are dropped.

    P = U Uᵀ and Q = V Vᵀ are the projections on the singular subspaces of old (s) and new (t) weight; both of one
    rank. The paper carries modules with Φ ≥ 0.8, left and right; here all are, unless ``threshold`` is given. Where
    depths differ (SDXL's 70 layers, SSD-1B's 40) it compares all pairs of layers; what it does with several good ones
    is not said: here each new module takes the update of the old module of its role that it overlaps with most.

    Args:
        pairs: all paired weights.
        subspace_rank: rank of the subspaces, or a share of the full rank.
        energy: share of ‖W‖² that the old weight's subspace holds.
        threshold: least chance-corrected overlap (mean of left and right) at which a module is carried; ``paper``:
            Φ ≥ 0.8 on both sides, as published.
        layers: ``paired``: each module with its counterpart; ``all``: with the one of its role that is most like it.
    """

    def carried(module: ModuleRef) -> Outcome:
        return pairs.for_adapter(module, _carried(*pairs.load(module), subspace_rank, energy, threshold))

    transports = dict(zip(pairs.wanted, pairs.side_by_side(carried), strict=True))
    if layers == "paired":
        return Fit(transports, "prolora")
    placed: dict[ModuleRef, dict[ModuleRef, Outcome]] = {module: {} for module in pairs.wanted}
    likeness: dict[ModuleRef, float] = {}
    for grid in grids(pairs, subspace_rank, energy).values():
        for j, target in enumerate(grid.news):
            if not grid.similarity[:, j].isfinite().any():
                continue
            best = int(grid.similarity[:, j].argmax())
            source = grid.olds[best]
            if source in placed:
                weights = pairs.weight("old", source), pairs.weight("new", target)
                outcome = _carried(*weights, subspace_rank, energy, threshold)
                placed[source][target] = pairs.for_adapter(source, outcome, target)
                likeness[source] = max(likeness.get(source, -1.0), float(grid.similarity[best, j]))
    return Fit(transports, "prolora", "each new layer takes the update of the old one most like it", likeness, placed)


def _carried(
    old: Tensor,
    new: Tensor,
    subspace_rank: int | float | None,
    energy: float | None,
    threshold: float | Literal["paper"] | None,
) -> Outcome:
    """One module's transport, or why it has none."""
    if old.shape != new.shape:
        return equal_sizes_only("prolora", old, new)
    u_old, v_old = directions(old, subspace_rank, energy)
    # Where the matrices are needed, they tell the rank, too, and nothing else has to be looked for.
    rank = u_old.rank if threshold is None else u_old.matrix.shape[1]
    u_new, v_new = directions(new, rank, None)
    if threshold == "paper":
        sides = phi(u_old.matrix, u_new.matrix), phi(v_old.matrix, v_new.matrix)
        if min(sides) < PAPER_THRESHOLD:
            return Skip(f"Φ is {sides[0]:.2f} on the left and {sides[1]:.2f} on the right, below {PAPER_THRESHOLD}")
    elif threshold is not None:
        similarity = (overlap(u_old.matrix, u_new.matrix) + overlap(v_old.matrix, v_new.matrix)) / 2
        if similarity < threshold:
            return Skip(f"subspace similarity {similarity:.2f} is below the threshold {threshold:g}")
    return Projected([u_old, u_new], [v_old, v_new])
