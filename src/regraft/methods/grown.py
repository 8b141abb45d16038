"""Grown: the inverse of how a larger base was made out of the old one."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.methods import Fit, Outcome, Skip, WeightPairs, method
from regraft.methods._units import UnitMatch
from regraft.nearness import similarity
from regraft.transport import IDENTITY, LinearMap, Transport

# Below this, what was grown is not the old base any more.
_EXPLAINED = 0.3
# From this on, `auto` is sure enough.
_SURE = 0.5
# A block's copy whose weight is this little of the old one's was silenced when it was added.
_SILENT = 0.1


@method(
    "grown",
    reference="the inverse of Net2Net (Chen et al. 2016, arXiv 1511.05641) and of block copying (LLaMA Pro, SOLAR)",
    summary="For a base grown from the old one: finds which units and blocks were copied, and spreads the update.",
    needs=("old", "new"),
    per="pair",
    resizes=True,
)
def grown(pairs: WeightPairs, *, copies: Literal["all", "first"] = "all") -> Fit:
    """ΔW_new = diag(g) C_out ΔW C_inᵀ diag(s): the update moves as the weight did.

    W_new ≈ diag(g) C_out W_old C_inᵀ diag(s), where C (m', m) says of which old unit each new one is a copy, and g and
    s are what the growth multiplied the copies' rows and columns by, one factor for all units with as many copies
    (`regraft.methods._units`). Net2Net: g = 1, s = 1 / count. Of a copied block, the update goes to every copy, times
    what its weight kept of the old one's: a copy that was silenced (LLaMA Pro zeroes its output projections) takes
    none there.

    Args:
        pairs: all paired weights.
        copies: of a block with several copies, those that take its update: all, or the one in its place alone.
    """
    match = UnitMatch(pairs)
    placed: dict[ModuleRef, dict[ModuleRef, Outcome]] = {}
    likeness: dict[ModuleRef, float] = {}
    added: dict[ModuleRef, list[ModuleRef]] = {}
    for copy, origin in pairs.pairing.origins.items():
        added.setdefault(origin, []).append(copy)
    for module in pairs.wanted:
        target = pairs.pairing[module].module
        assert target is not None
        old, new = pairs.load(module)
        transport = match.transport(module)
        alike = 0.0 if transport is None else similarity(transport.dense(old), new)
        if transport is None or alike < _EXPLAINED:
            placed[module] = {target: Skip("nothing in the weights says what the new units grew from", planned=False)}
            continue
        likeness[module] = alike
        placed[module] = {target: transport}
        for copy in added.get(module, ()) if copies == "all" else ():
            kept = _kept(old, pairs.weight("new", copy))
            if kept is not None:
                placed[module][copy] = kept
    blocks = len({_block(new) for new in pairs.pairing.origins})
    reason = f"{match.grown} hidden spaces with copied units, {blocks} blocks that copy others"
    return Fit(_paired(pairs, placed), "grown", reason, likeness, placed)


def grown_from(pairs: WeightPairs) -> Fit | None:
    """`grown` where it explains every wanted weight of the new base by the old one's; None where it does not."""
    fit = grown(pairs)
    outcomes = [outcome for places in fit.placed.values() for outcome in places.values()]
    if not outcomes or any(isinstance(outcome, Skip) for outcome in outcomes) or min(fit.similarity.values()) < _SURE:
        return None
    return fit


def _paired(pairs: WeightPairs, placed: dict[ModuleRef, dict[ModuleRef, Outcome]]) -> dict[ModuleRef, Outcome]:
    """Of every wanted module, what goes to its own counterpart."""
    found: dict[ModuleRef, Outcome] = {}
    for module in pairs.wanted:
        target = pairs.pairing[module].module
        assert target is not None
        found[module] = placed[module][target]
    return found


def _kept(old: Tensor, copy: Tensor) -> Transport | None:
    """The share of a weight that its copy kept, ⟨copy, old⟩ / ‖old‖², as a transport; None where it kept next to none.

    A share near 1 is taken as 1: what is missing is drift.
    """
    if old.shape != copy.shape:
        return None
    share = float((old * copy).sum() / old.square().sum().clamp_min(1e-30))
    if share < _SILENT:
        return None
    return Transport() if share > 0.75 else Transport(((LinearMap(share), IDENTITY),))


def _block(module: ModuleRef) -> str:
    parts = module.path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else module.path
