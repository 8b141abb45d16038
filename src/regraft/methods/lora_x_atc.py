"""LoRA-X with layers paired by its adapter transferability cost, an optimal transport between layers."""

from __future__ import annotations

import torch

from regraft.adapter import ModuleRef
from regraft.methods import Fit, Outcome, Skip, WeightPairs, method
from regraft.methods._layers import grids, role_of, transport_plan
from regraft.methods.lora_x import lora_x


@method(
    "lora-x-atc",
    reference="LoRA-X (Farhadzadeh et al., ICLR 2025, arXiv 2501.16559, §4.2.4)",
    summary="lora-x with each layer's update sent where an optimal transport between the bases' layers sends it.",
    needs=("old", "new"),
    per="pair",
    resizes=True,
)
def lora_x_atc(pairs: WeightPairs, *, subspace_rank: int | float | None = None, energy: float | None = None) -> Fit:
    """Each old module goes, by `lora-x`, to the new module of its role that takes most of its mass.

    The paper's cost (ATC) is an optimal transport cost over the layers' subspace similarities; its formula could not
    be found, and it is not used there to pair layers. Chosen: per role, uniform weights on the old and on the new
    modules, cost 1 − similarity (eq. 4, chance-corrected, of one shape), ATC = Σ plan · cost, averaged over roles.

    Args:
        pairs: all paired weights.
        subspace_rank: rank of the subspaces, or a share of the full rank.
        energy: share of ‖W‖² that they hold.
    """
    placed: dict[ModuleRef, dict[ModuleRef, Outcome]] = {}
    likeness: dict[ModuleRef, float] = {}
    costs = []
    found = grids(pairs, subspace_rank, energy)
    for grid in found.values():
        if not grid.similarity.isfinite().any():
            continue
        cost = (1 - grid.similarity).clamp_min(0)
        plan = transport_plan(cost)
        costs.append(float((plan * cost.nan_to_num(posinf=0.0)).sum()))
        for i, old in enumerate(grid.olds):
            if old in set(pairs.wanted) and grid.similarity[i].isfinite().any():
                # A tie (a layer that goes halves to two) is broken by likeness, and by the pairing.
                own = torch.tensor([ref == pairs.pairing[old].module for ref in grid.news])
                best = int((plan[i] + 1e-6 * grid.similarity[i].clamp_min(-1) + 1e-6 * own).argmax())
                new = grid.news[best]
                outcome = lora_x(None, pairs.weight("new", new), subspace_rank=subspace_rank, energy=energy)
                placed[old] = {new: pairs.for_adapter(old, outcome, new)}
                likeness[old] = float(grid.similarity[i, best])
    nowhere = Skip("no module of its role has its shape in the new base", planned=False)
    transports: dict[ModuleRef, Outcome] = {}
    for module in pairs.wanted:
        placed.setdefault(module, {module: nowhere})
        transports[module] = next(iter(placed[module].values()))
    cost_over = sum(costs) / len(costs) if costs else 1.0
    reason = f"adapter transferability cost {cost_over:.3f} over {len({role_of(m) for m in pairs.wanted})} roles"
    return Fit(transports, "lora-x-atc", reason, likeness, placed)
