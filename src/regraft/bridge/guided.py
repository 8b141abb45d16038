"""The old base with and without its adapter on one state, each with its own text encoders and with guidance."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.probes.diffusion import Call, Enough, first_argument, recording, sample_latents
from regraft.runtime.load import Loaded


@dataclass(frozen=True)
class Prompted:
    """One denoiser with the conditioning of some prompts.

    Attributes:
        model: a pipeline.
        call: what it hands to its denoiser at its first step.
        guidance: scale of classifier-free guidance.
        pace: what the denoiser is told of a timestep, as a multiple of the scheduler's.
        pictures: how many.
    """

    model: Loaded
    call: Call
    guidance: float
    pace: float
    pictures: int

    @classmethod
    def of(
        cls,
        model: Loaded,
        prompts: Sequence[str],
        negative: Sequence[str] | None,
        guidance: float | None,
        shape: Any,
        steps: int | None = None,
    ) -> Prompted:
        """Run the pipeline up to its denoiser.

        Args:
            model: a pipeline.
            prompts: one per picture.
            negative: what to keep away from, one per picture; None: as the pipeline has it.
            guidance: None: the pipeline's own default.
            shape: height and width of the latents.
            steps: that the pipeline's scheduler is set to; None: as many as probes take.

        Raises:
            InputError: it can't be run on prompts alone, or packs its latents into rows.
        """
        own = inspect.signature(model.pipeline.__call__).parameters.get("guidance_scale")
        scale = guidance if guidance is not None else float(own.default) if own is not None else 1.0
        factor = getattr(model.pipeline, "vae_scale_factor", 8)
        sizes = {"height": shape[0] * factor, "width": shape[1] * factor}
        without = None if negative is None else list(negative)
        counted: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
        calls: list[Call] = []
        with recording(model.main, calls, stop=True), suppress(Enough):
            sample_latents(model, list(prompts), 0, guidance_scale=scale, negative_prompt=without, **sizes, **counted)
        call = calls[0]
        latents = call[first_argument(model)]
        if latents.dim() != 4 or tuple(latents.shape[2:]) != tuple(shape):
            raise InputError(f"{model.name} does not give its denoiser pictures of latents", file=model.path)
        first = float(model.pipeline.scheduler.timesteps[0])
        told = float(torch.as_tensor(call["timestep"]).flatten()[0])
        if first > 0 and told <= 0:
            raise InputError(f"{model.name} tells its denoiser the time in a way of its own", file=model.path)
        return cls(model, call, scale, told / first if first else 1.0, len(prompts))

    @property
    def rows(self) -> int:
        """Of a pass: twice the pictures under guidance."""
        return int(self.call[first_argument(self.model)].shape[0])

    def predict(self, z: Tensor, time: float) -> Tensor:
        """The guided prediction of states (n, channels, height, width) at a timestep of the scheduler's, float32."""
        main, name = self.model.main, first_argument(self.model)
        rows = self.call[name].shape[0]
        inputs = z.to(self.model.device, main.dtype).repeat(rows // len(z), 1, 1, 1)
        told = torch.as_tensor(self.call["timestep"])
        times = torch.full(told.shape, time * self.pace, device=self.model.device)
        found: Tensor = main(**{**self.call, name: inputs, "timestep": times, "return_dict": False})[0]
        # Some predict a variance, too.
        found = found[:, : z.shape[1]].float()
        if rows == len(z):
            return found.to(z.device)
        without, prompted = found.chunk(2)
        return (without + self.guidance * (prompted - without)).to(z.device)
