"""Theseus: orthogonal maps between both bases' spaces, found from activations."""

from __future__ import annotations

from statistics import mean

import torch
from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.methods import Fit, Outcome, Skip, WeightPairs, method
from regraft.nearness import cosine
from regraft.transport import LinearMap, Transport


@method(
    "theseus",
    reference="Theseus / BiCo (github.com/apanariello4/merge-and-rebase), τ_t = T_outᵀ τ_s T_in",
    summary="Rotates each update by the orthogonal maps that best take the old base's activations to the new one's.",
    needs=("old", "new", "models"),
    per="pair",
    resizes=True,
)
def theseus(pairs: WeightPairs) -> Fit:
    """ΔW_t = T_outᵀ ΔW_s T_in, with T = argmin ‖X_s T − X_t‖ over orthogonal T, from the SVD of X_sᵀ X_t.

    T_in comes from a module's inputs and T_out from its outputs, each without centring. Where a space has directions
    in which nothing was ever seen, the map of those is arbitrary. Between sizes T has orthonormal rows or columns.

    Args:
        pairs: all paired weights, with statistics.
    """
    outcomes: dict[ModuleRef, Outcome] = {}
    similarity: dict[ModuleRef, float] = {}
    for module in pairs.wanted:
        seen = pairs.statistics(module)
        if seen is None:
            outcomes[module] = Skip("both models don't run it once, on inputs that answer to each other", planned=False)
            continue
        t_in, t_out = _orthogonal(seen.in_cross), _orthogonal(seen.out_cross)
        if seen.transposed:
            t_in, t_out = t_out, t_in
        turn = Transport(((LinearMap(0.0, t_out.T.contiguous()), LinearMap(0.0, t_in)),), rotates=True)
        outcomes[module] = pairs.for_adapter(module, turn)
        old, new = pairs.load(module)
        similarity[module] = cosine(t_out.T @ old.float().cpu() @ t_in, new.float().cpu())
    found = f"after the rotation, weights have a cosine of {mean(similarity.values()):.2f}" if similarity else ""
    return Fit(outcomes, "theseus", found, similarity)


def _orthogonal(cross: Tensor) -> Tensor:
    """argmax tr(Tᵀ C) over matrices with orthonormal rows or columns: U Vᵀ; (m, m')."""
    u, _, vh = torch.linalg.svd(cross.double(), full_matrices=False)
    turned: Tensor = (u @ vh).float()
    return turned
