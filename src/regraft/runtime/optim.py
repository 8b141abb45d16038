"""What every training of an adapter shares: its steps, the course of its learning rate, gradient checkpointing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regraft.errors import RegraftError
from regraft.runtime.libraries import library
from regraft.runtime.load import Loaded

#: AdamW of torch, or of bitsandbytes with its moments in 8 bits.
Optimizer = Literal["adamw", "adamw8bit"]
#: Of the passes, as accelerate names it.
Precision = Literal["no", "fp16", "bf16"]
# Of the learning rate: the first steps rise to it, the last fall to this share of it.
_WARM_UP, _LAST = 10, 0.1
_LONGEST_GRADIENT = 1.0


class Stepper:
    """AdamW without weight decay, by accelerate: mixed precision, scaled gradients where that needs them, clipping.

    Args:
        parameters: that are trained.
        optimizer: which AdamW.
        rate: the learning rate at its peak.
        precision: of the passes.
        device: where they run.

    Raises:
        RegraftError: bitsandbytes is wanted and not installed.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: Optimizer, rate: float, precision: Precision, device: str
    ) -> None:
        accelerate = library("accelerate")
        # It holds one precision for the whole process, and would refuse a second training in another.
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator: Any = accelerate.Accelerator(
            mixed_precision=precision, cpu=device == "cpu", device_placement=False
        )
        self.parameters, self.rate = list(parameters), rate
        # Prepared, it unscales what `fp16` has scaled, and leaves out steps that overflowed.
        self.optimizer: Any = self.accelerator.prepare(_optimizer(self.parameters, optimizer, rate))

    def scaling(self) -> dict[str, Any]:
        """How much gradients are scaled, where half precision needs it; empty elsewhere."""
        scaler = self.accelerator.scaler
        found: dict[str, Any] = {} if scaler is None else scaler.state_dict()
        return found

    def scale_as(self, kept: dict[str, Any]) -> None:
        """Go on from what `scaling` gave."""
        if kept and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(kept)

    def at(self, step: int, steps: int) -> None:
        """Set the learning rate of a step out of so many."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * pace(step, steps)

    def learn(self, loss: Tensor) -> float:
        """One step down a loss, (); its value, or NaN where its gradient is not finite and nothing was changed."""
        self.accelerator.backward(loss)
        length = self.accelerator.clip_grad_norm_(self.parameters, _LONGEST_GRADIENT)
        value = float(loss.detach())
        # A scaled gradient that overflows lowers the scale, and is no fault.
        scaled = self.accelerator.scaler is not None
        if math.isfinite(value) and (scaled or math.isfinite(float(length))):
            self.optimizer.step()
        else:
            value = math.nan
        self.optimizer.zero_grad(set_to_none=True)
        return value


def pace(step: int, steps: int) -> float:
    """A share of the learning rate: it rises over the first steps, and falls along a cosine to a tenth."""
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    done = (step - _WARM_UP) / max(1, steps - _WARM_UP)
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * done))


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The numbers below ``n`` in the order of an epoch."""
    generator = torch.Generator().manual_seed(seed + 7919 * epoch)
    return tuple(torch.randperm(n, generator=generator).tolist())


def checkpoint_activations(model: Loaded) -> None:
    """Have the main model compute its activations twice, where its class can.

    A pipeline's text encoders stay in eval mode: some have dropout.
    """
    main = model.main
    enable = getattr(main, "gradient_checkpointing_enable", getattr(main, "enable_gradient_checkpointing", None))
    if enable is not None:
        enable()
        main.train()


def _optimizer(parameters: list[nn.Parameter], name: Optimizer, rate: float) -> Any:
    settings: dict[str, Any] = {"lr": rate, "weight_decay": 0.0, "betas": (0.9, 0.99)}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    try:
        bitsandbytes = library("bitsandbytes")
    except RegraftError as error:
        raise RegraftError("bitsandbytes is not installed", remedy="Take --optimizer adamw.") from error
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)
