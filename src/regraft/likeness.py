"""How alike two fingerprints are: the same weights in another dtype, a later version of them, or other weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regraft.fingerprint import ComponentPrint, Fingerprint
from regraft.sketch import Sample, Sketch, is_quantised

#: ``identical``: equal hashes. ``same``: equal up to rounding or quantisation. ``drifted``: another version.
#: ``unrelated``: no correspondence. ``other``: no tensor in common, or nothing to compare them by.
Verdict = Literal["identical", "same", "drifted", "unrelated", "other"]

# Unit roundoff, and half of the smallest step, of each dtype.
ROUNDING: dict[str, tuple[float, float]] = {
    "F64": (2.0**-53, 0.0),
    "F32": (2.0**-24, 0.0),
    "F16": (2.0**-11, 2.0**-25),
    "BF16": (2.0**-9, 0.0),
    "F8_E4M3": (2.0**-4, 2.0**-10),
    "F8_E5M2": (2.0**-3, 2.0**-17),
}
# Relative error ‖Q(W) − W‖ / ‖W‖ up to which quantised values count as those of W, by the beginning of a word
# of its name: about 1.3 times what each cost on heavy-tailed weights (Student's t, 5 degrees of freedom); for q6,
# q3, q2 and iq, which the gguf package can't make, from their step sizes. A drift below it can't be seen.
QUANTISED: dict[str, float] = {
    "q8": 0.015,
    "int8": 0.03,
    "fp8": 0.06,
    "f8": 0.06,
    "q6": 0.03,
    "q5": 0.07,
    "q4": 0.14,
    "iq4": 0.14,
    "nf4": 0.14,
    "fp4": 0.2,
    "int4": 0.18,
    "gptq": 0.25,
    "awq": 0.25,
    "q3": 0.27,
    "iq3": 0.27,
    "q2": 0.5,
    "iq2": 0.5,
}
_OTHER_QUANTISED = 0.25
# Below this cosine the weights have no more to do with each other than by chance (as in `regraft.forecast`).
_RELATED = 0.5
# Samples with more values than a bias's are those of weights; biases and norms look alike in unrelated models too.
_VECTOR = 8
_SKETCH = 2.0**-11


@dataclass(frozen=True)
class Likeness:
    """How alike two versions of one component are.

    Attributes:
        verdict: see `Verdict`.
        basis: what the verdict was read from.
        drift: estimate of ‖W2 − W1‖ / ‖W1‖; None without two sketches. 0 for identical ones.
        error: its standard error.
        floor: the drift that rounding and quantisation alone explain.
        similarity: cosine of the weights' samples, centred; 1 equal, about 0 unrelated.
        overlap: share of the first one's elements that lie in tensors that the second has too.
        touched: share of the common elements that lie in tensors that differ.
    """

    verdict: Verdict
    basis: Literal["content", "sample", "sketch", "structure"]
    drift: float | None = None
    error: float | None = None
    floor: float | None = None
    similarity: float | None = None
    overlap: float = 1.0
    touched: float | None = None

    def __str__(self) -> str:
        if self.verdict == "identical":
            return "the same weights, by hash"
        if self.verdict == "same":
            return f"the same weights, up to rounding or quantisation (it explains {self.floor or 0:.2%})"
        if self.verdict == "other":
            return "another architecture" if self.overlap == 0 else "the same architecture; no sketch to compare by"
        how_far = f"drift {self.drift or 0:.2%} ± {self.error or 0:.2%}"
        return f"another version, {how_far}" if self.verdict == "drifted" else f"unrelated weights ({how_far})"


def compare_fingerprints(old: Fingerprint, new: Fingerprint) -> dict[str, Likeness]:
    """Component of ``old`` → how alike the two are; without those that ``new`` has no counterpart of.

    A model alone has no component name: it is compared with the component that it has most in common with.
    """
    found = {}
    for name, part in old.components.items():
        if name in new.components:
            found[name] = compare_components(part, new.components[name])
        elif "model" in (name, *new.components):
            others = {"model": new.components["model"]} if "model" in new.components else new.components
            alike = [compare_components(part, other) for other in others.values()]
            best = max(alike, key=lambda likeness: (likeness.verdict != "other", likeness.overlap))
            if best.verdict != "other":
                found[name] = best
    return found


def compare_components(old: ComponentPrint, new: ComponentPrint) -> Likeness:
    """How alike two versions of one component are, by the strongest evidence that both have."""
    if old.content is not None and old.content == new.content:
        return Likeness("identical", "content", 0.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    told_apart = old.content is not None and new.content is not None
    if old.sample == new.sample and not told_apart:
        return Likeness("identical", "sample", 0.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    if old.sketch is not None and new.sketch is not None:
        return compare_sketches(old.sketch, new.sketch)
    return Likeness("other", "structure", overlap=float(old.structure == new.structure))


def compare_sketches(old: Sketch, new: Sketch) -> Likeness:
    """How alike two versions are, by their samples."""
    pairs = [_Pair(sample, new.samples[id_]) for id_, sample in old.samples.items() if id_ in new.samples]
    pairs = [pair for pair in pairs if pair.count]
    total = old.size
    common = sum(pair.size for pair in pairs)
    if not pairs:
        return Likeness("other", "sketch", overlap=0.0)
    known = [pair for pair in pairs if len(pair.old)]
    drift, error = _drift(known)
    floor = math.sqrt(_ratio((pair.size * pair.rounding() for pair in known), known))
    similarity = _similarity(known)
    differing = [pair for pair in pairs if not pair.agrees()] + _quantised_apart(known)
    touched = sum(pair.size for pair in {id(pair): pair for pair in differing}.values()) / common
    verdict: Verdict = "drifted"
    if not differing:
        verdict = "same"
    elif similarity is not None and similarity < _RELATED:
        verdict = "unrelated"
    return Likeness(verdict, "sketch", drift, error, floor, similarity, common / max(1, total), touched)


class _Pair:
    """One tensor's two samples, float64, without the places where either is NaN or Inf."""

    def __init__(self, old: Sample, new: Sample) -> None:
        self.kinds, self.size, self.whole = (old.kind, new.kind), old.size, old.size <= len(old.values)
        self.count, a, b = len(old.values), old.values, new.values
        if len(a) != len(b):
            self.count, a, b = 0, a[:0], b[:0]
        finite = a.isfinite() & b.isfinite()
        # NaN in both, or the same Inf, is no difference.
        self.odd = int((~finite & ~((a == b) | (a.isnan() & b.isnan()))).sum())
        self.old, self.new = a[finite].double(), b[finite].double()

    @property
    def tolerance(self) -> float | None:
        """The relative error that quantisation explains; None for plain dtypes."""
        found = [_tolerance(kind) for kind in self.kinds if is_quantised(kind)]
        return max(found) if found else None

    def agrees(self) -> bool:
        """Whether rounding explains the difference."""
        if not len(self.old):
            return self.odd == 0
        if self.tolerance is not None:
            return _relative([self]) <= 2 * self.tolerance
        largest = float(torch.maximum(self.old.abs().max(), self.new.abs().max()))
        bound = torch.maximum(self.old.abs(), self.new.abs()) * 2 * _SKETCH + largest * 2.0**-23
        for kind, values in zip(self.kinds, (self.old, self.new), strict=True):
            unit, step = ROUNDING.get(kind, (0.0, 0.0))
            bound += 2 * (unit * values.abs() + step)
        out = int(((self.old - self.new).abs() > bound).sum()) + self.odd
        return 8 * out <= self.count

    def rounding(self) -> float:
        """Mean square of the difference that rounding makes, about."""
        mean_square = float(self.old.square().mean())
        if self.tolerance is not None:
            return self.tolerance**2 * mean_square
        units = [ROUNDING.get(kind, (0.0, 0.0)) for kind in self.kinds]
        return sum((unit**2 * mean_square + step**2) / 3 for unit, step in units) + 2 * _SKETCH**2 * mean_square / 3


def _tolerance(kind: str) -> float:
    # Readers name the tool too: "bnb nf4".
    known = {name: size for name, size in QUANTISED.items() if any(word.startswith(name) for word in kind.split())}
    return max(known.values(), default=_OTHER_QUANTISED)


def _relative(pairs: Iterable[_Pair]) -> float:
    """‖b − a‖ / ‖a‖ over samples, each tensor weighted by its size."""
    num = den = 0.0
    for pair in pairs:
        num += pair.size * float((pair.new - pair.old).square().mean())
        den += pair.size * float(pair.old.square().mean())
    return math.sqrt(num / den) if den > 0 else (math.inf if num > 0 else 0.0)


def _quantised_apart(pairs: list[_Pair]) -> list[_Pair]:
    """All pairs of a quantisation whose error over all its tensors is above its tolerance."""
    apart = []
    for tolerance in {pair.tolerance for pair in pairs} - {None}:
        group = [pair for pair in pairs if pair.tolerance == tolerance]
        assert tolerance is not None
        if _relative(group) > tolerance:
            apart += group
    return apart


def _ratio(numerators: Iterable[float], pairs: list[_Pair]) -> float:
    den = sum(pair.size * float(pair.old.square().mean()) for pair in pairs)
    return sum(numerators) / den if den > 0 else 0.0


def _drift(pairs: list[_Pair]) -> tuple[float, float]:
    """The drift and its standard error, by the spread between a tensor's runs (a ratio of two stratified sums)."""
    den = sum(pair.size * float(pair.old.square().mean()) for pair in pairs)
    drift = _relative(pairs)
    if den <= 0 or not 0 < drift < math.inf:
        return drift, 0.0
    variance = 0.0
    for pair in pairs:
        residual = (pair.new - pair.old).square() - drift**2 * pair.old.square()
        if not pair.whole and len(residual) > 4:
            means = torch.stack([run.mean() for run in residual.tensor_split(4)])
            variance += pair.size**2 * float(means.var()) / 4
    return drift, math.sqrt(variance) / den / (2 * drift)


def _similarity(pairs: list[_Pair]) -> float | None:
    dots = [0.0, 0.0, 0.0]
    for pair in pairs:
        if len(pair.old) <= _VECTOR:
            continue
        old, new = _centred(pair.old), _centred(pair.new)
        for i, (a, b) in enumerate(((old, new), (old, old), (new, new))):
            dots[i] += pair.size * float((a * b).mean())
    return dots[0] / math.sqrt(dots[1] * dots[2]) if dots[1] > 0 and dots[2] > 0 else None


def _centred(values: Tensor) -> Tensor:
    return values - values.mean()


def by_component(likenesses: Mapping[str, Likeness]) -> str:
    """One line for people: each component and how alike."""
    return "; ".join(f"{name}: {likeness}" for name, likeness in likenesses.items()) or "nothing in common"
