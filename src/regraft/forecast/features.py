"""The figures that a forecast is made from: each 0 where old and new base are the same, and larger with more damage."""

from __future__ import annotations

from collections.abc import Mapping
from math import log1p, sqrt
from typing import Literal

from regraft.adapter import ModuleRef
from regraft.forecast.evidence import Evidence

Stage = Literal["headers", "weights", "activations"]

_HEADERS = ("removed", "resized", "added")
#: What each stage's forecast goes by; see `features`. Few, since few pairs of bases were measured.
FIGURES: Mapping[Stage, tuple[str, ...]] = {
    "headers": _HEADERS,
    "weights": (*_HEADERS, "drift", "outweighed"),
    "activations": (*_HEADERS, "drift", "outweighed", "effect moved"),
}
#: Damage that one unit of a figure is believed to do before anything is measured. What no row shows rests on it.
BELIEF: Mapping[str, float] = {
    "removed": 2.0,
    "resized": 4.0,
    "added": 0.5,
    "drift": 0.3,
    "outweighed": 0.5,
    "effect moved": 0.5,
}
#: What a weight is never fitted below: rows of unrelated bases say that nothing is left, and not how surely.
LEAST_WEIGHT: Mapping[str, float] = {"drift": 0.2}

# An update this faint beside its weight counts as no fainter: ratios to it would blow up.
_FAINTEST = 1e-2
# From this drift on, weights have nothing to do with each other.
_MOST = 10.0


def features(evidence: Evidence) -> dict[str, float]:
    """Name → figure; those of a stage that was not reached are absent.

    Means are weighted by the modules' shares of ‖ΔW‖².

    - ``removed``, ``resized``: share of the update without a place in the new base, and in modules of another size for
      which no correspondence was found. ``added``: share of the new base's modules that answer to no old one.
    - ``drift``: mean of tan²∠(W_old, W_new), the relative drift squared: what became of the weights under it.
    - ``outweighed``: log(1 + q²), with q the mean of the same tangent over the update's strength ‖ΔW‖ / ‖W‖: a strong
      update is felt through more drift than a faint one. Of all that was tried, the figure that tells most; at a weight
      of ½, recovery is 1 / √(1 + q²), the cosine of an update with itself and that much drift beside it.
    - ``effect moved``: see `regraft.forecast.probing`.

    The others (``inside``, ``inputs``, ``outputs``, ``turned``, ``base``, ``strength``, ``contained``) are kept beside
    them for a later fit, and for people.
    """
    near = {ref: n for ref, n in evidence.nearness.items() if n.similarity is not None}
    unknown = sum(evidence.shares.get(ref, 0.0) for ref in evidence.nearness if ref not in near)
    survey = evidence.survey
    found = {"removed": evidence.removed, "resized": unknown, "added": survey.added if survey is not None else 0.0}
    if not near:
        return found
    angles = {ref: angle(n.similarity or 0.0) for ref, n in near.items()}
    strengths = {ref: max(_FAINTEST, n.strength) for ref, n in near.items() if n.strength is not None}
    # Of an update whose strength isn't known (a kind that is no LoRA), drift counts as it is for a middling one.
    usual = evidence.mean(dict(strengths)) or 0.3
    ratios = {ref: min(_MOST, value / strengths.get(ref, usual)) for ref, value in angles.items()}
    found["drift"] = evidence.mean({ref: value**2 for ref, value in angles.items()}) or 0.0
    found["outweighed"] = log1p((evidence.mean(dict(ratios)) or 0.0) ** 2)
    return found | _beside(evidence, angles) | dict(evidence.probe)


def _beside(evidence: Evidence, angles: Mapping[ModuleRef, float]) -> dict[str, float]:
    """Figures that no forecast goes by today."""
    still = {ref: evidence.nearness[ref] for ref in angles if ref not in evidence.rotated}
    means = {
        "inside": {ref: n.adapter_distance for ref, n in still.items()},
        "inputs": {ref: n.input_distance for ref, n in still.items()},
        "outputs": {ref: n.output_distance for ref, n in still.items()},
        "strength": {ref: n.strength for ref, n in still.items()},
        "contained": {ref: n.contained for ref, n in still.items()},
    }
    found = {name: mean for name, values in means.items() if (mean := evidence.mean(values)) is not None}
    if (survey := evidence.survey) is not None:
        if survey.overlap is not None:
            found["turned"] = 1 - max(0.0, survey.overlap)
        if survey.drift is not None:
            found["base"] = survey.drift
    return found


def angle(similarity: float) -> float:
    """The tangent of the angle between two weights: their relative drift where that is square to the weight.

    >>> round(angle(1 / (1 + 0.36**2) ** 0.5), 6)
    0.36
    """
    cosine = max(1e-9, min(1.0, similarity))
    return min(_MOST, sqrt(1 / cosine**2 - 1))


def stage_of(figures: Mapping[str, float]) -> Stage:
    """The last stage whose figures are all there."""
    reached: Stage = "headers"
    for stage, names in FIGURES.items():
        if all(name in figures for name in names):
            reached = stage
    return reached
