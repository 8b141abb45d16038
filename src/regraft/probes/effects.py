"""What an adapter does to a model's output, compared between two models, with intervals over inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regraft.report.schema import Interval

RESAMPLES, LEVEL = 1000, 0.95


@dataclass(frozen=True)
class Comparison:
    """One input's figures; None where one is not defined.

    Attributes:
        cosine: between the two effects, flattened.
        ratio: ‖new effect‖ / ‖old effect‖; where the outputs have different shapes, each norm is taken relative
            to its own model's output.
        pooled: cosine between the effects on the mean over positions.
        kl: mean over positions of KL(old + adapter ‖ new + adapter), in nats.
    """

    cosine: float | None
    ratio: float | None
    pooled: float | None = None
    kl: float | None = None


def compare(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], *, comparable: bool, logits: bool = False
) -> Comparison:
    """Compare what one adapter does to the old model with what another does to the new, on one input.

    Args:
        before: old model's output without and with its adapter, (positions, width) or any one shape.
        after: the same of the new model.
        comparable: whether the two models' outputs mean the same, coordinate by coordinate.
        logits: whether they are logits (then the KL is taken, and they are centred first).
    """
    old, new = (_effect(*pair, logits=logits) for pair in (before, after))
    old_norm, new_norm = float(old.norm()), float(new.norm())
    if not comparable or old.shape != new.shape:
        sizes = [float(_centred(pair[0].double(), logits).norm()) for pair in (before, after)]
        defined = old_norm > 0 and min(sizes) > 0
        return Comparison(None, (new_norm / sizes[1]) / (old_norm / sizes[0]) if defined else None)
    return Comparison(
        cosine=cosine(old, new),
        ratio=new_norm / old_norm if old_norm > 0 else None,
        pooled=cosine(old.mean(0), new.mean(0)) if old.dim() == 2 and not logits else None,
        kl=divergence(before[1], after[1]) if logits else None,
    )


def _effect(without: Tensor, with_adapter: Tensor, *, logits: bool) -> Tensor:
    return _centred(with_adapter.double() - without.double(), logits)


def _centred(output: Tensor, logits: bool) -> Tensor:
    # Logits are defined up to a constant per position.
    return output - output.mean(-1, keepdim=True) if logits else output


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Cosine of two tensors of one shape, flattened; None where one is zero."""
    norms = float(a.norm()) * float(b.norm())
    return float((a.flatten() @ b.flatten()) / norms) if norms > 0 else None


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean over positions of KL(p ‖ q) in nats, of logits (positions, vocabulary)."""
    log_p, log_q = (torch.log_softmax(logits.double(), -1) for logits in (p, q))
    return max(0.0, float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))


def interval(values: Sequence[float | None], *, seed: int, undefined: str, note: str | None = None) -> Interval:
    """Mean over inputs, with the bootstrap's percentile interval (Efron 1979): inputs drawn with replacement.

    Args:
        values: one per input; None where it is not defined.
        seed: of the resampling.
        undefined: the reason to give where no input defines it.
        note: said beside a defined figure.
    """
    defined = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(defined):
        return Interval(mean=None, low=None, high=None, reason=undefined)
    mean = low = high = float(defined.mean())
    # Of one value, or of equal ones, every resample has the same mean; SciPy refuses a single one.
    if np.ptp(defined) > 0:
        # Importing it takes a second, which most runs have no use for.
        from scipy.stats import bootstrap

        low, high = bootstrap(
            (defined,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    if len(defined) < len(values):
        note = f"defined on {len(defined)} of {len(values)} inputs" + (f"; {note}" if note else "")
    return Interval(mean=mean, low=float(low), high=float(high), reason=note)
