"""The figures that a forecast is made from: each 0 where old and new base are the same, and larger with more damage."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Literal

from regraft.adapter import ModuleRef
from regraft.forecast.evidence import Evidence
from regraft.nearness import Nearness

Stage = Literal["headers", "weights", "activations"]

# An update this faint beside its weight counts as no fainter: ratios to it would blow up.
_FAINTEST = 1e-3
# Drift from which on weights have nothing to do with each other: that of two independent draws is √2.
_MOST = 1.5


def features(evidence: Evidence) -> dict[str, float]:
    """Name → figure; those of a stage that was not reached are absent.

    Means are weighted by the modules' shares of ‖ΔW‖².
    """
    found = {"removed": evidence.removed, "resized": evidence.resized}
    near = {ref: n for ref, n in evidence.nearness.items() if n.similarity is not None}
    if not near:
        return found
    drifts = {ref: _drift(n, ref in evidence.rotated) for ref, n in near.items()}

    def mean(values: Mapping[ModuleRef, float | None]) -> float:
        filled = {ref: drifts[ref] if value is None else min(value, _MOST) for ref, value in values.items()}
        return evidence.mean(filled) or 0.0

    still = {ref: n for ref, n in near.items() if ref not in evidence.rotated}
    nothing = dict.fromkeys(near, None)
    found["drift"] = mean(drifts)
    found["apart"] = evidence.mean({ref: 1 - max(0.0, min(1.0, n.similarity or 0.0)) for ref, n in near.items()}) or 0.0
    found["inside"] = mean(nothing | {ref: n.adapter_distance for ref, n in still.items()})
    found["inputs"] = mean(nothing | {ref: n.input_distance for ref, n in still.items()})
    found["outputs"] = mean(nothing | {ref: n.output_distance for ref, n in still.items()})
    faint = {ref: drifts[ref] / max(_FAINTEST, n.strength) for ref, n in near.items() if n.strength is not None}
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
        found["base"] = found["drift"] if survey.drift is None else min(_MOST, survey.drift)
        if survey.overlap is not None:
            found["turned"] = 1 - max(0.0, survey.overlap)
    return found | dict(evidence.probe)


def _drift(near: Nearness, rotated: bool) -> float:
    """The relative drift; of a rotated module, that of equally long weights of its aligned similarity."""
    if rotated or near.distance is None:
        return sqrt(2 * (1 - max(0.0, min(1.0, near.similarity or 0.0))))
    return min(near.distance, _MOST)
