"""What every training of an adapter shares: its optimiser, the course of its learning rate, gradient checkpointing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from regraft.errors import RegraftError
from regraft.runtime.libraries import library
from regraft.runtime.load import Loaded

#: AdamW of torch, or of bitsandbytes with its moments in 8 bits.
Optimizer = Literal["adamw", "adamw8bit"]
# Of the learning rate: the first steps rise to it, the last fall to this share of it.
_WARM_UP, _LAST = 10, 0.1


def optimizer_of(parameters: Iterable[nn.Parameter], name: Optimizer, rate: float) -> Any:
    """AdamW without weight decay.

    Raises:
        RegraftError: bitsandbytes is wanted and not installed.
    """
    settings: dict[str, Any] = {"lr": rate, "weight_decay": 0.0, "betas": (0.9, 0.99)}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    try:
        bitsandbytes = library("bitsandbytes")
    except RegraftError as error:
        raise RegraftError("bitsandbytes is not installed", remedy="Take --optimizer adamw.") from error
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def pace(step: int, steps: int) -> float:
    """A share of the learning rate: it rises over the first steps, and falls along a cosine to a tenth."""
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    done = (step - _WARM_UP) / max(1, steps - _WARM_UP)
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * done))


def checkpoint_activations(model: Loaded) -> None:
    """Have activations computed twice, where the model's class can."""
    for part in model.components.values():
        enable = getattr(part, "gradient_checkpointing_enable", getattr(part, "enable_gradient_checkpointing", None))
        if enable is not None:
            enable()
            part.train()
