"""The figures that a forecast is made from: each 0 where old and new base are the same, and larger with more damage."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Literal

from regraft.adapter import ModuleRef
from regraft.forecast.evidence import Evidence

Stage = Literal["headers", "weights", "activations"]

#: What each stage's forecast goes by; see `features`.
FIGURES: Mapping[Stage, tuple[str, ...]] = {
    "headers": ("removed", "resized"),
    "weights": ("removed", "resized", "turned", "faint"),
    "activations": ("removed", "resized", "turned", "faint", "moved"),
}

# An update this faint beside its weight counts as no fainter: ratios to it would blow up.
_FAINTEST = 1e-2
# From here on, weights have nothing to do with each other; for features that have no end of their own.
_MOST = 4.0


def features(evidence: Evidence) -> dict[str, float]:
    """Name → figure; those of a stage that was not reached are absent.

    Means are weighted by the modules' shares of ‖ΔW‖².
    """
    found = {"removed": evidence.removed, "resized": evidence.resized}
    near = {ref: n for ref, n in evidence.nearness.items() if n.similarity is not None}
    if not near:
        return found
    angles = {ref: angle(n.similarity or 0.0) for ref, n in near.items()}

    def mean(values: Mapping[ModuleRef, float | None]) -> float:
        filled = {ref: angles[ref] if value is None else min(value, _MOST) for ref, value in values.items()}
        return evidence.mean(filled) or 0.0

    still = {ref: n for ref, n in near.items() if ref not in evidence.rotated}
    nothing = dict.fromkeys(near, None)
    found["angle"] = mean(angles)
    found["angle2"] = mean({k: v * v for k, v in angles.items()})
    found["rms"] = found["angle2"] ** 0.5
    found["drift"] = mean(nothing | {ref: n.distance for ref, n in still.items()})
    found["inside"] = mean(nothing | {ref: n.adapter_distance for ref, n in still.items()})
    found["inputs"] = mean(nothing | {ref: n.input_distance for ref, n in still.items()})
    found["outputs"] = mean(nothing | {ref: n.output_distance for ref, n in still.items()})
    faint = {ref: min(_MOST, angles[ref] / max(_FAINTEST, n.strength)) for ref, n in near.items() if n.strength is not None}
    if faint:
        found["faint"] = evidence.mean(faint) or 0.0
    strength = evidence.mean({ref: n.strength for ref, n in near.items()})
    if strength is not None:
        found["strength"] = strength
    contained = evidence.mean({ref: n.contained for ref, n in near.items()})
    if contained is not None:
        found["contained"] = contained
    if (survey := evidence.survey) is not None:
        found["added"] = survey.added
        if survey.drift is not None:
            found["base"] = min(_MOST, survey.drift)
        if survey.overlap is not None:
            found["turned"] = 1 - max(0.0, survey.overlap)
    return found | dict(evidence.probe)


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
