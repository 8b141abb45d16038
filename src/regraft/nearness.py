"""How near two weights are: the evidence that the verdict and `auto` go by. No model is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from regraft.updates import LowRank

# So many elements of a weight at once stay in a processor's cache while all is measured on them.
_BLOCK = 1 << 18
# By how many of a weight's elements it is told what chance alone would make of its likeness.
_CHANCE = 1 << 19


@dataclass(frozen=True)
class Nearness:
    """How near the old and the new weight of one module are.

    Attributes:
        similarity: cosine of the weights, corrected for chance; 1 equal, about 0 unrelated. None across shapes.
        distance: relative drift ‖W_new − W_old‖ / ‖W_old‖. None across shapes.
        adapter_distance: the drift as the update meets it, on its own row and column spaces (see `measure`).
        contained: how much of the update the drift holds: ⟨W_new − W_old, ΔW⟩ / ‖ΔW‖². 1 where it was merged.
        contained_noise: standard deviation of that figure for a drift that has nothing to do with the update.
        strength: how strong the update is, ‖ΔW‖ / ‖W_old‖.
        input_distance: the drift on the directions of input that the update reads, ‖D Q_A‖ / ‖W_old Q_A‖.
        output_distance: the drift on the directions of output that it writes, ‖Q_Bᵀ D‖ / ‖Q_Bᵀ W_old‖.
    """

    similarity: float | None = None
    distance: float | None = None
    adapter_distance: float | None = None
    contained: float | None = None
    contained_noise: float | None = None
    strength: float | None = None
    input_distance: float | None = None
    output_distance: float | None = None


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors of one shape; 0 where either is all zeros."""
    norms = float(a.norm()) * float(b.norm())
    return float((a * b).sum()) / norms if norms > 0 else 0.0


@dataclass(frozen=True)
class Measured:
    """All that one pass over two weights shows.

    Attributes:
        nearness: of the two.
        row_norms: (2, out), float32: norms of the old and the new weight's rows; None across shapes.
    """

    nearness: Nearness
    row_norms: Tensor | None


def similarity(old: Tensor, new: Tensor) -> float:
    """(c − c₀) / (1 − c₀), with c the cosine of two (out, in) weights and c₀ that after a shift of rows and columns.

    The shift breaks every correspondence but keeps common means and scales, which alone would make unrelated
    weights look alike (embeddings, weights with an offset). c₀ of a large weight is that of a sample of its rows.
    """
    if torch.equal(old, new):
        return 1.0
    one, other = old.float(), new.float()
    return _beyond_chance(cosine(one, other), old, new, float(one.norm()) ** 2, float(other.norm()) ** 2)


def _beyond_chance(found: float, old: Tensor, new: Tensor, before: float, after: float) -> float:
    """What a cosine is above that of the shifted weights; ``before`` and ``after`` are the squared norms of both."""
    rows, columns = old.shape
    runs = max(1, -(-rows * columns // _CHANCE))
    chance, seen = _chance(old, new, runs)
    # A sample that holds another share of the norms than of the rows has missed the rows that count, or met only them.
    expected = before * seen[2], after * seen[2]
    if runs > 1 and any(abs(part - whole) > 0.2 * whole for part, whole in zip(seen[:2], expected, strict=True)):
        chance, _ = _chance(old, new, 1)
    return (found - chance) / (1 - chance)


def _chance(old: Tensor, new: Tensor, runs: int) -> tuple[float, tuple[float, float, float]]:
    """The shifted weights' cosine on so many runs of rows, and what share of both norms and of the rows they hold."""
    rows, columns = old.shape
    held = max(1, rows // runs)
    count = 0
    dot = norm_old = norm_new = 0.0
    for index in range(runs):
        # Each run within its share of the rows, so that a sample is spread over all of them.
        first = index * rows // runs
        here = range(first, min(first + max(1, held // runs), rows)) if runs > 1 else range(rows)
        count += len(here)
        for block in _blocks(here, columns):
            one = old[block].float()
            # Rolled by half of the rows and half of the columns.
            place = (torch.arange(block.start, block.stop) - max(1, rows // 2)) % rows
            other = new[place.to(new.device)].float().roll(max(1, columns // 2), 1)
            dot += float(torch.dot(one.reshape(-1), other.reshape(-1)))
            norm_old += float(one.norm()) ** 2
            norm_new += float(other.norm()) ** 2
    scale = sqrt(norm_old * norm_new)
    return min(max(0.0, dot / scale if scale > 0 else 0.0), 0.99), (norm_old, norm_new, count / rows)


def _blocks(rows: range, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, columns))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


class _OnUpdate:
    """A matrix X on an update's spaces, added up over its rows.

    Attributes:
        read: ‖X Q_A‖².
        written: Q_Bᵀ X, (r, in).
        both: Q_Bᵀ X Q_A, (r, r).
    """

    def __init__(self, q_up: Tensor, q_down: Tensor) -> None:
        self.q_up, self.q_down, self.read = q_up, q_down, 0.0
        self.written = q_down.new_zeros(q_up.shape[1], len(q_down))
        self.both = q_down.new_zeros(q_up.shape[1], q_down.shape[1])

    def add(self, rows: slice, block: Tensor) -> None:
        up, read = self.q_up[rows].T, block @ self.q_down
        self.written.addmm_(up, block)
        self.both.addmm_(up, read)
        self.read += float(read.norm()) ** 2


def measure(old: Tensor, new: Tensor, update: LowRank | None = None) -> Measured:
    """Both weights side by side, in one pass over their rows.

    With Q_B and Q_A orthonormal bases of the update's column and row spaces, the drift D = W_new − W as the update
    meets it is ‖Q_Bᵀ D Q_A‖ / ‖Q_Bᵀ W Q_A‖ on both of its spaces, ‖D Q_A‖ / ‖W Q_A‖ on its inputs alone and
    ‖Q_Bᵀ D‖ / ‖Q_Bᵀ W‖ on its outputs alone; None where the old weight is zero there. The share of the update that the
    drift already holds is ⟨D, ΔW⟩ / ‖ΔW‖². By chance (a drift of random direction) its mean is 0, its deviation
    ‖D‖ / (‖ΔW‖ √(out·in)).

    Args:
        old: W, a matrix (out, in) of any float dtype.
        new: W_new, (out', in').
        update: the adapter's own, of the old weight.
    """
    if old.shape != new.shape:
        return Measured(Nearness(), None)
    rows, columns = old.shape
    own = update
    if own is not None and (own.up.shape[0], own.down.load().flatten(1).shape[1]) != (rows, columns):
        own = None
    met: tuple[_OnUpdate, _OnUpdate] | None = None
    if own is not None:
        up, down = (part.to(old.device) for part in own.factors())
        (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
        met = _OnUpdate(q_up, q_down), _OnUpdate(q_up, q_down)
    norms, squared_drift = torch.empty(2, rows, device=old.device), 0.0
    for block in _blocks(range(rows), columns):
        one, other = old[block].float(), new[block].float()
        torch.linalg.vector_norm(one, dim=1, out=norms[0, block])
        torch.linalg.vector_norm(other, dim=1, out=norms[1, block])
        drift = other - one
        squared_drift += float(drift.norm()) ** 2
        if met is not None:
            for side, part in zip(met, (drift, one), strict=True):
                side.add(block, part)
    before, after = (float(part.double().square().sum()) for part in norms.cpu())
    near = _alike(old, new, before, after, squared_drift)
    if own is None or met is None:
        return Measured(near, norms)
    moved, held = met
    size, noise, share = own.norm(), None, None
    if size > 0:
        # ⟨D, B A⟩ = tr(R_Bᵀ Q_Bᵀ D Q_A R_A) with B = Q_B R_B and Aᵀ = Q_A R_A.
        share = float(((r_up.T @ moved.both) * r_down.T).sum()) * own.scale / size**2
        noise = sqrt(squared_drift) / (size * sqrt(old.numel()))
    near = replace(
        near,
        adapter_distance=_ratio(float(moved.both.norm()), float(held.both.norm())),
        contained=share,
        contained_noise=noise,
        strength=_ratio(size, sqrt(before)),
        input_distance=_ratio(sqrt(moved.read), sqrt(held.read)),
        output_distance=_ratio(float(moved.written.norm()), float(held.written.norm())),
    )
    return Measured(near, norms)


def _alike(old: Tensor, new: Tensor, before: float, after: float, drift: float) -> Nearness:
    """Similarity and distance, of the squared norms of both and of what lies between them."""
    if drift == 0 and torch.equal(old, new):
        return Nearness(1.0, 0.0)
    # ⟨W, W_new⟩ by the cosine rule: a pass for it alone would cost as much again.
    scale = sqrt(before * after)
    cos = (before + after - drift) / (2 * scale) if scale > 0 else 0.0
    found = _beyond_chance(max(-1.0, min(1.0, cos)), old, new, before, after)
    return Nearness(found, sqrt(drift / before) if before > 0 else float("inf"))


def _ratio(moved: float, base: float) -> float | None:
    return moved / base if base > 0 else None


def compare(old: Tensor, new: Tensor, update: LowRank | None = None) -> Nearness:
    """The nearness of two matrices (out, in) alone; see `measure`."""
    return measure(old, new, update).nearness
