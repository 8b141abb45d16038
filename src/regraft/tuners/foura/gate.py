"""The gate of FouRA: which rank directions act on an input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def adaptive_mask(seen: Tensor, projection: Tensor, threshold: float, sharpness: float) -> Tensor:
    """One mask per position: 1 where the entropy of a learnt projection is high, else 0.

    The paper has G(z) = 1 where S(H(G z)) = 1, else 0, S a sigmoid, H an entropy and G learnt (arXiv 2406.08798); what
    distribution H is of, and how a sigmoid comes to 1, it doesn't say. Here p = sigmoid(G z) is one probability per
    direction, H its entropy in bits, and S = sigmoid(sharpness · (H − threshold)) is rounded to 0 or 1. The rounding
    passes the gradient of S through (straight-through estimator).

    Args:
        seen: z = A F(x), (…, r); magnitudes, where it is complex.
        projection: G, (r, r).
        threshold: in bits, between 0 and 1.
        sharpness: above 0.

    Returns:
        (…, r), of 0 and 1.
    """
    logits = functional.linear(seen, projection)
    # −p log p − (1 − p) log(1 − p), by log-sigmoids: exact where p comes to 0 or 1.
    p = torch.sigmoid(logits)
    nats = -(p * functional.logsigmoid(logits) + (1 - p) * functional.logsigmoid(-logits))
    soft = torch.sigmoid(sharpness * (nats * 1.4426950408889634 - threshold))
    hard = (soft >= 0.5).to(soft.dtype)
    # The difference is exactly 0, so that the mask is exactly 0 or 1.
    return hard + (soft - soft.detach())
