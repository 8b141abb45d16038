"""A pipeline's latents: pictures in and out of them, and its denoiser's predictions of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.runtime.load import Loaded


def predicted(pipeline: Any) -> str:
    """What a pipeline's denoiser predicts: ``flow``, or as diffusers' schedulers name it."""
    scheduler = getattr(pipeline, "scheduler", None)
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow"
    return str(getattr(getattr(scheduler, "config", None), "prediction_type", "epsilon"))


@dataclass(frozen=True)
class Latents:
    """How a pipeline reads and writes pictures, and what its denoiser predicts of a noisy state z = α x + σ ε.

    Schedulers with ``alphas_cumprod`` keep α² + σ² = 1; those of flow matching α + σ = 1, and predict ε − x.
    """

    model: Loaded

    @property
    def scale(self) -> tuple[float, float]:
        """Factor and shift: latents are (what the autoencoder gives − shift) · factor."""
        config = self.model.pipeline.vae.config
        return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (n, 3, h, w), from −1 to 1."""
        factor, shift = self.scale
        with self._vae() as vae:
            picture: Tensor = vae.decode(latents.to(vae.device, vae.dtype) / factor + shift).sample
        return picture.float().clamp(-1, 1)

    def encode(self, pictures: Tensor) -> Tensor:
        factor, shift = self.scale
        with self._vae() as vae:
            mode: Tensor = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mode()
        return ((mode - shift) * factor).float()

    @contextmanager
    def _vae(self) -> Iterator[Any]:
        """The autoencoder; in float32 where its values overflow float16 (SDXL's), as diffusers' pipelines run it."""
        vae = self.model.pipeline.vae
        narrow = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
        if not narrow:
            yield vae
            return
        vae.to(torch.float32)
        try:
            yield vae
        finally:
            vae.to(torch.float16)

    @property
    def noise_is_known(self) -> bool:
        """Whether the scheduler says how much noise there is at a timestep."""
        return self._predicts == "flow" or hasattr(self.model.pipeline.scheduler, "alphas_cumprod")

    @property
    def steps(self) -> int:
        """Of the schedule that the model was trained with."""
        return int(self.model.pipeline.scheduler.config.num_train_timesteps)

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ, (n, 1, 1, 1)."""
        if self._predicts == "flow":
            sigma = (times.float() / self.steps)[:, None, None, None]
            return 1 - sigma, sigma
        kept = self.model.pipeline.scheduler.alphas_cumprod[times].float()[:, None, None, None]
        return kept.sqrt(), (1 - kept).sqrt()

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What a denoiser is trained to predict of α x + σ ε, with x ``clean`` and ε ``noise``."""
        alpha, sigma = self.levels(times)
        if self._predicts == "flow":
            return noise - clean
        if self._predicts == "v_prediction":
            return alpha * noise - sigma * clean
        return clean if self._predicts == "sample" else noise

    def clean(self, prediction: Tensor, z: Tensor, times: Tensor) -> Tensor:
        """The picture's latents in a prediction."""
        alpha, sigma = self.levels(times)
        if self._predicts == "flow":
            return z - sigma * prediction
        if self._predicts == "v_prediction":
            return alpha * z - sigma * prediction
        return prediction if self._predicts == "sample" else (z - sigma * prediction) / alpha.clamp_min(0.02)

    def prediction(self, clean: Tensor, z: Tensor, times: Tensor) -> Tensor:
        """The inverse of `clean`."""
        alpha, sigma = self.levels(times)
        if self._predicts == "flow":
            return (z - clean) / sigma.clamp_min(0.05)
        if self._predicts == "v_prediction":
            return (alpha * z - clean) / sigma.clamp_min(0.05)
        return clean if self._predicts == "sample" else (z - alpha * clean) / sigma.clamp_min(0.05)

    @property
    def _predicts(self) -> str:
        return predicted(self.model.pipeline)
