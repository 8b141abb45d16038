"""How near two weights are: the evidence that the verdict and `auto` go by. No model is run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.updates import LowRank


@dataclass(frozen=True)
class Nearness:
    """How near the old and the new weight of one module are.

    Attributes:
        similarity: cosine of the weights, corrected for chance; 1 equal, about 0 unrelated. None across shapes.
        distance: relative drift ‖W_new − W_old‖ / ‖W_old‖. None across shapes.
        adapter_distance: the drift as the update meets it, on its own row and column spaces (see `within`).
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


def similarity(old: Tensor, new: Tensor) -> float:
    """(c − c₀) / (1 − c₀), with c the cosine of two (out, in) weights and c₀ that after a shift of rows and columns.

    The shift breaks every correspondence but keeps common means and scales, which alone would make unrelated
    weights look alike (embeddings, weights with an offset).
    """
    if torch.equal(old, new):
        return 1.0
    shifted = new.roll((max(1, new.shape[0] // 2), max(1, new.shape[1] // 2)), (0, 1))
    chance = min(max(0.0, cosine(old, shifted)), 0.99)
    return (cosine(old, new) - chance) / (1 - chance)


def within(old: Tensor, drift: Tensor, update: LowRank) -> tuple[float | None, float | None, float | None]:
    """The drift as the update meets it: on its two spaces at once, on its inputs alone, on its outputs alone.

    ‖Q_Bᵀ D Q_A‖ / ‖Q_Bᵀ W Q_A‖, ‖D Q_A‖ / ‖W Q_A‖ and ‖Q_Bᵀ D‖ / ‖Q_Bᵀ W‖, with Q_B and Q_A orthonormal bases of the
    update's column and row spaces. None where the old weight is zero there.

    Args:
        old: W, (out, in).
        drift: D = W_new − W, (out, in).
        update: the adapter's own.
    """
    up, down = update.factors()
    q_up, q_down = torch.linalg.qr(up)[0], torch.linalg.qr(down.T)[0]

    def ratio(moved: Tensor, base: Tensor) -> float | None:
        norm = float(base.norm())
        return float(moved.norm()) / norm if norm > 0 else None

    read, read_old = drift @ q_down, old @ q_down
    return ratio(q_up.T @ read, q_up.T @ read_old), ratio(read, read_old), ratio(q_up.T @ drift, q_up.T @ old)


def contained(drift: Tensor, update: LowRank) -> tuple[float, float] | None:
    """⟨drift, ΔW⟩ / ‖ΔW‖², the share of the update that the drift already holds, and its standard deviation by chance.

    None for a zero update. By chance (a drift of random direction) the mean is 0, the deviation ‖D‖ / (‖ΔW‖ √(out·in)).
    """
    up, down = update.factors()
    norm = update.norm()
    if norm == 0:
        return None
    share = float((up.T @ drift @ down.T).trace()) * update.scale / norm**2
    return share, float(drift.norm()) / (norm * drift.numel() ** 0.5)


def compare(old: Tensor, new: Tensor, update: LowRank | None = None) -> Nearness:
    """All of the above for one module; ``old`` and ``new`` are float32 matrices (out, in)."""
    if old.shape != new.shape:
        return Nearness()
    drift, norm = new - old, float(old.norm())
    relative = float(drift.norm()) / norm if norm > 0 else (0.0 if not drift.any() else float("inf"))
    if update is None or (update.up.shape[0], update.down.load().flatten(1).shape[1]) != tuple(old.shape):
        return Nearness(similarity(old, new), relative)
    both, inputs, outputs = within(old, drift, update)
    held, noise = contained(drift, update) or (None, None)
    strength = update.norm() / norm if norm > 0 else None
    return Nearness(similarity(old, new), relative, both, held, noise, strength, inputs, outputs)
