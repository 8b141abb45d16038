"""Choose by the evidence of the weights, and under drift of both models' outputs; in doubt, copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean, median
from time import perf_counter

import torch

from regraft.adapter import ModuleRef
from regraft.errors import RegraftError
from regraft.methods import Carried, Fit, Outcome, Skip, WeightPairs, method
from regraft.methods._choosing import HeldOut, lowest, scaled
from regraft.methods._few_steps import MANY, FewSteps
from regraft.methods.effect import PULLS, Sweep, sweep_layers
from regraft.methods.grown import grown_from
from regraft.methods.procrustes import procrustes
from regraft.methods.task import AdapterTask
from regraft.probes.batches import Batches, make_batches
from regraft.runtime.libraries import quiet_libraries
from regraft.transport import Transport
from regraft.updates import Update
from regraft.widening import widened

# From this mean similarity on, units are in place and a copy is the method to beat: no map of weights has beaten it.
_IN_PLACE = 0.5
# A rotated weight keeps its singular values; where they differ by more than this, no rotation explains the change.
_SAME_SPECTRUM = 0.15
_SPECTRA = 5
# Below this drift, weighted by the adapter, a copy is left as it is and no model is run.
_NEAR = 0.05
# By how much another way must be better than the copy.
_MARGIN = 0.03
# How many times the adapter's own rank is tried, and how much of the copy's error that must save.
_TIMES, _WIDER = 4, 0.05
# Pulls that are tried with it.
_PULLS_WIDER = (0.25, 0.5, 1.0)
_STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)


def _same_spectra(pairs: WeightPairs, modules: list[ModuleRef]) -> bool:
    step = max(1, len(modules) // _SPECTRA)
    distances = []
    for module in modules[::step]:
        old, new = (torch.linalg.svdvals(weight) for weight in pairs.load(module))
        distances.append(float((old - new).norm() / old.norm().clamp_min(1e-30)))
    return median(distances) < _SAME_SPECTRUM


def looks_further(used: str, distance: float | None) -> bool:
    """Whether both bases are run to look for something better than what the weights gave.

    Args:
        used: what they gave.
        distance: relative drift, weighted by the adapter; None where it is not known.
    """
    return used in ("copy", "grown") and distance is not None and distance >= _NEAR


def by_running(task: AdapterTask, chosen: Fit) -> Carried | str | None:
    """Under drift, run both bases and take what comes nearest to the old one's outputs with the adapter.

    Candidates are what the weights gave (the copy, or `grown`), the same at its best strength, and `effect` with
    several pulls, all on held-out inputs that the models made themselves. Anything but the first has to be clearly
    better. An adapter that makes few unguided steps do for many guided ones is judged by just that on the new base:
    what it does to the old base's single predictions is the old base's own guidance.

    Args:
        task: the adapter and both bases.
        chosen: what the weights alone gave.
    """
    if not looks_further(chosen.method, task.distance):
        return None
    if task.running.weights_only:
        return "no model was run (--weights-only)"
    try:
        with quiet_libraries():
            models = task.models
            inputs = make_batches(models, task.adapter, task.running.n_inputs, task.seed, task.prompts)
            few = FewSteps.of(task)
            judge = _by_outputs(chosen, task, inputs) if few is None else _by_purpose(chosen, few)
    except RegraftError as error:
        return f"the bases can't be run to look for more ({error.what})"
    with quiet_libraries():
        return _best(task, inputs, judge)


@dataclass(frozen=True)
class _Judge:
    """How candidates are judged.

    Attributes:
        first: the method whose port is the one to beat.
        error: of updates, 0 where they are perfect.
        made: what the error is, or is measured on.
    """

    first: str
    error: Callable[[Mapping[ModuleRef, Update]], float]
    made: str


def _by_outputs(chosen: Fit, task: AdapterTask, inputs: Batches) -> _Judge:
    held = HeldOut(task, inputs.held_out)
    return _Judge(chosen.method, lambda updates: held.score(updates).total(), inputs.made)


def _by_purpose(chosen: Fit, few: FewSteps) -> _Judge:
    made = f"what its {few.steps} unguided steps leave of the way to {MANY} guided ones, which is what it is for"
    return _Judge(chosen.method, few.error, made)


def _best(task: AdapterTask, inputs: Batches, judge: _Judge) -> Carried | str:
    started = perf_counter()
    first = task.as_wanted(task.copied().updates)
    errors = [judge.error(scaled(first, strength)) for strength in _STRENGTHS]
    strength = lowest(_STRENGTHS, errors)
    again = "scaled-copy" if judge.first == "copy" else judge.first
    candidates = [Carried(scaled(first, strength), again, figures={"strength": strength})]
    sweeps = [Sweep(pull) for pull in PULLS]
    if task.rank is None:
        # Under drift, what there is to carry has more rank than the adapter: a wider file, where that pays.
        sweeps += [Sweep(pull, times=_TIMES) for pull in _PULLS_WIDER]
    candidates += sweep_layers(task, inputs.fit, sweeps)
    totals = [judge.error(candidate.updates) for candidate in candidates]
    by_first = errors[_STRENGTHS.index(1.0)]
    # A wider file has to be worth its size.
    size = [_WIDER * by_first if candidate.figures.get("times_rank", 1.0) > 1 else 0.0 for candidate in candidates]
    weighed = [total + more for total, more in zip(totals, size, strict=True)]
    best = min(range(len(totals)), key=weighed.__getitem__)
    if totals[best] > (1 - _MARGIN) * by_first:
        return f"on held-out inputs nothing was better than {_named(judge.first)} (error {by_first:.2f})"
    figures = {"held_out": totals[best], "copy_held_out": by_first, "seconds_choosing": perf_counter() - started}
    reason = f"on held-out inputs its error is {totals[best]:.2f}, {_named(judge.first)}'s {by_first:.2f}; {judge.made}"
    return replace(candidates[best], reason=reason, figures={**candidates[best].figures, **figures})


def _named(method: str) -> str:
    return "the copy" if method == "copy" else f"`{method}`"


@method(
    "auto",
    reference="regraft's own rules",
    summary="Copy, unless the weights show that hidden units moved and a rotation brings them back; under drift, what "
    "comes nearest on held-out inputs that both bases make and read. Says why.",
    needs=("old", "new"),
    per="pair",
    resizes=True,
    after=by_running,
)
def auto(pairs: WeightPairs) -> Fit:
    """Copy where units are in place; `grown` where the new base grew from the old one; else the way that is found.

    That is `procrustes` where it finds a correspondence that a copy lacks, and a copy again where it does not.

    Args:
        pairs: all paired weights.
    """
    near: dict[ModuleRef, float] = {}
    wide: dict[ModuleRef, Transport] = {}
    resized: list[ModuleRef] = []
    for module, nearness in zip(pairs.wanted, pairs.side_by_side(pairs.nearness), strict=True):
        similarity = nearness.similarity
        if similarity is not None:
            near[module] = similarity
        elif (transport := widened(*pairs.load(module))) is not None:
            wide[module] = transport
        else:
            resized.append(module)
    if pairs.pairing.origins and not pairs.sampled and (fit := grown_from(pairs)) is not None:
        return fit
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
    if resized and (fit := grown_from(pairs)) is not None:
        return fit
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
