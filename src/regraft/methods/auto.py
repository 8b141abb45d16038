"""Choose by the weights' evidence; in doubt, copy."""

from __future__ import annotations

from statistics import mean, median

import torch

from regraft.adapter import ModuleRef
from regraft.methods import Fit, Outcome, Skip, WeightPairs, method
from regraft.methods.procrustes import procrustes
from regraft.transport import Transport
from regraft.widening import widened

# From this mean similarity on, units are in place and a copy is the method to beat: no map of weights has beaten it.
_IN_PLACE = 0.5
# A rotated weight keeps its singular values; where they differ by more than this, no rotation explains the change.
_SAME_SPECTRUM = 0.15
_SPECTRA = 5


def _same_spectra(pairs: WeightPairs, modules: list[ModuleRef]) -> bool:
    step = max(1, len(modules) // _SPECTRA)
    distances = []
    for module in modules[::step]:
        old, new = (torch.linalg.svdvals(weight) for weight in pairs.load(module))
        distances.append(float((old - new).norm() / old.norm().clamp_min(1e-30)))
    return median(distances) < _SAME_SPECTRUM


@method(
    "auto",
    reference="regraft's own rules",
    summary="Copy, unless the weights show that hidden units moved and a rotation brings them back. Says why.",
    needs=("old", "new"),
    per="pair",
    resizes=True,
)
def auto(pairs: WeightPairs) -> Fit:
    """Copy where units are in place; `procrustes` where it finds a correspondence that a copy lacks; else copy.

    Args:
        pairs: all paired weights.
    """
    near: dict[ModuleRef, float] = {}
    wide: dict[ModuleRef, Transport] = {}
    resized: list[ModuleRef] = []
    for module in pairs.wanted:
        similarity = pairs.nearness(module).similarity
        if similarity is not None:
            near[module] = similarity
        elif (transport := widened(*pairs.load(module))) is not None:
            wide[module] = transport
        else:
            resized.append(module)
    in_place = mean(near.values()) if near else 0.0
    if near and in_place >= _IN_PLACE:
        reason = f"the weights are still in place (similarity {in_place:.2f}), where a copy is hard to beat"
        return Fit(_copied(near, wide, resized), "copy", reason)
    if pairs.sampled:
        reason = "the weights are not in place; the bases were read in part, which is not enough to look for more"
        return Fit(_copied(near, wide, resized), "copy", reason)
    if near and not resized and not _same_spectra(pairs, list(near)):
        return Fit(
            _copied(near, wide, resized),
            "copy",
            "no correspondence found between the weights: nothing better than a copy",
        )
    rotated = procrustes(pairs)
    aligned = mean(rotated.similarity.values()) if rotated.similarity else in_place
    if aligned >= max(_IN_PLACE, in_place + 0.2):
        reason = (
            f"hidden units moved: a rotation lifts the similarity of the weights from {in_place:.2f} to {aligned:.2f}"
        )
        return Fit(rotated.transports, "procrustes", reason, rotated.similarity)
    reason = f"no correspondence found between the weights (similarity {max(in_place, aligned):.2f})"
    if resized and not near:
        return Fit(
            rotated.transports,
            "procrustes",
            f"{reason}; sizes differ, so that a copy is not possible",
            rotated.similarity,
        )
    return Fit(_copied(near, wide, resized), "copy", f"{reason}: nothing better than a copy")


def _copied(
    same: dict[ModuleRef, float], wide: dict[ModuleRef, Transport], resized: list[ModuleRef]
) -> dict[ModuleRef, Outcome]:
    skip = Skip("the module has another size in the new base, and no correspondence was found", planned=False)
    return {**dict.fromkeys(same, Transport()), **wide, **dict.fromkeys(resized, skip)}
