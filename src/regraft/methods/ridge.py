"""Ridge on activations, with the identity as prior."""

from __future__ import annotations

import torch

from regraft.adapter import ModuleRef
from regraft.errors import UsageError
from regraft.methods import Fit, Outcome, Skip, WeightPairs, method
from regraft.transport import IDENTITY, LinearMap, Transport

_UNKNOWN = "both models don't run it once, on inputs that answer to each other"


@method(
    "ridge",
    reference="regraft's own: regression on activations, as between embeddings (Mikolov et al. 2013, arXiv 1309.4168)",
    summary="Maps each module's new inputs to the old ones, as far as they drifted; the prior is a copy.",
    needs=("old", "new", "models"),
    per="pair",
    resizes=True,
)
def ridge(pairs: WeightPairs, *, ridge: float = 0.3) -> Fit:
    """ΔW_t = ΔW_s (X_s X_tᵀ + λI)(X_t X_tᵀ + λI)⁻¹, the solution of min ‖ΔW_t X_t − ΔW_s X_s‖² + λ ‖ΔW_t − ΔW_s‖².

    It is linear in ΔW_s, and so one map of the inputs for every adapter. Where a module's inputs have another size
    there is no identity, and the prior is zero.

    Args:
        pairs: all paired weights, with statistics.
        ridge: λ in units of the mean diagonal of X_t X_tᵀ.
    """
    if not ridge > 0:
        raise UsageError(f"--ridge {ridge} is out of range", remedy="Give a number above 0.")
    outcomes: dict[ModuleRef, Outcome] = {}
    for module in pairs.wanted:
        seen = pairs.statistics(module)
        if seen is None:
            # No evidence of drift: the prior.
            near = pairs.nearness(module).distance
            outcomes[module] = Transport() if near is not None else Skip(_UNKNOWN, planned=False)
            continue
        if seen.out_cross.shape[0] != seen.out_cross.shape[1]:
            outcomes[module] = Skip("its outputs have another size in the new base", planned=False)
            continue
        inputs, cross = seen.in_new.double(), seen.in_cross.double()
        size = ridge * inputs.diagonal().mean().clamp_min(1e-30)
        prior = size * torch.eye(*cross.shape, dtype=torch.float64)
        if cross.shape[0] != cross.shape[1]:
            prior = torch.zeros_like(prior)
        metric = inputs + size * torch.eye(len(inputs), dtype=torch.float64)
        moved = LinearMap(0.0, torch.linalg.solve(metric, cross + prior, left=False).float())
        found = Transport(((moved.T, IDENTITY) if seen.transposed else (IDENTITY, moved),))
        outcomes[module] = pairs.for_adapter(module, found)
    return Fit(outcomes, "ridge")
