"""What the diffusion world trains and tests on: latents of pictures, noise, and the distilled sampler's ways.

Everything is drawn from a seed and a step alone, and what takes long is kept in the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.bench import diffusion_art as art
from regraft.bench.resume import step_generator

EMPTY = len(art.PROMPTS)
"""The index of the empty prompt, which stands behind all others."""
EMPTY_SHARE = 0.1
"""How many prompts are left out in training, so that guidance has an unconditional side."""
TEACHER_STEPS, FEW_STEPS, GUIDANCE = 16, 2, 2.0
"""Two steps, since these bases are so small that four of their own come near to sixteen."""

#: (latents (n, 8, 16, 16), timesteps (n,), prompt embeddings (n, 16, 64)) → prediction of v, like the latents.
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Latents:
    """Scaled latents (n, 8, 16, 16) in float16, and the index of each one's prompt (n,)."""

    values: Tensor
    prompts: Tensor

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Noised:
    """Noised latents, timesteps, the v to predict, and prompt indices."""

    states: Tensor
    times: Tensor
    aims: Tensor
    prompts: Tensor


@dataclass(frozen=True)
class Data:
    """The latents of one autoencoder, by the name of a data set, kept under ``cache``.

    Names: an art set ("noto"), or one in a look ("fluent-cyano"); with "-test" behind, drawings that
    nothing is trained on.
    """

    cache: Path
    vae: Path

    def latents(self, name: str) -> Latents:
        kept = self.cache / "diffusion" / "latents" / f"{self.vae.parent.name}-{name}.pt"
        if not kept.exists():
            values, prompts = self._made(name)
            save(kept, {"values": values, "prompts": prompts})
        found = torch.load(kept, weights_only=True)
        return Latents(found["values"], found["prompts"])

    def _made(self, name: str) -> tuple[Tensor, Tensor]:
        set_name, *rest = name.removesuffix("-test").split("-")
        folder = self.cache / "art"
        folder.mkdir(parents=True, exist_ok=True)
        rgba = art.drawings(set_name, folder, test=name.endswith("-test"))
        pictures = art.styled(rgba, rest[0]) if rest else art.plain(rgba)
        pixels, prompts = pictures.pixels, pictures.prompts
        if not rest:
            # Each drawing on one background in training sets and tests alike: six would only repeat its shape.
            variants = rgba.shape[1]
            kept = (np.arange(len(pixels)) // variants + np.arange(len(pixels)) % variants) % 6 == 0
            pixels, prompts = pixels[kept], prompts[kept]
        return encode(self.vae, pixels), torch.from_numpy(prompts)


@torch.no_grad()
def encode(vae: Path, pixels: art.Pixels) -> Tensor:
    """Scaled latents of uint8 pictures (n, 3, 32, 32): float16 (n, 8, 16, 16)."""
    model = open_autoencoder(vae)
    parts = [torch.from_numpy(pixels[at : at + 256]).float() / 127.5 - 1 for at in range(0, len(pixels), 256)]
    codes = torch.cat([model.encode(part).latent_dist.mode() for part in parts])
    scaled: Tensor = (codes * model.config.scaling_factor).half()
    return scaled


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> art.Floats:
    """Pictures (n, 32, 32, 3) in [0, 1] of scaled latents."""
    pictures = vae.decode(latents.float() / vae.config.scaling_factor).sample
    shown: art.Floats = (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return shown


def open_autoencoder(folder: Path) -> Any:
    """The autoencoder in ``folder``, float32."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


class Schedule:
    """The noise of the demo's scheduler: x_t = a·x₀ + s·ε, and v = a·ε − s·x₀ is what is predicted."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.signal, self.noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    @classmethod
    def of(cls, folder: Path) -> Schedule:
        from diffusers import DDIMScheduler

        return cls(DDIMScheduler.from_pretrained(folder).alphas_cumprod)

    def at(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s), each (n, 1, 1, 1); a time below 0 is the clean end."""
        shape, clean = (-1, 1, 1, 1), (times < 0).view(-1, 1, 1, 1)
        a, s = (values[times.clamp(min=0)].view(shape) for values in (self.signal, self.noise))
        return torch.where(clean, torch.ones_like(a), a), torch.where(clean, torch.zeros_like(s), s)

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and v."""
        a, s = self.at(times)
        return a * clean + s * noise, a * noise - s * clean

    def step(self, state: Tensor, v: Tensor, times: Tensor, after: Tensor) -> Tensor:
        """One DDIM step (η = 0) from ``times`` to ``after`` (Song et al. 2021, eq. 12, in terms of v)."""
        a, s = self.at(times)
        a_next, s_next = self.at(after)
        return a_next * (a * state - s * v) + s_next * (a * v + s * state)

    def v_between(self, state: Tensor, later: Tensor, times: Tensor, after: Tensor) -> Tensor:
        """The v with which one DDIM step leads from ``state`` to ``later``: `step` solved for v."""
        a, s = self.at(times)
        a_next, s_next = self.at(after)
        return (later - (a_next * a + s_next * s) * state) / (s_next * a - a_next * s)

    def times(self, steps: int) -> list[int]:
        """Timesteps in "trailing" spacing, followed by −1, the clean end."""
        whole = len(self.signal)
        return [round(whole - place * whole / steps) - 1 for place in range(steps)] + [-1]


def training_batch(data: Latents, schedule: Schedule, seed: int, step: int, size: int) -> Noised:
    """The batch of one training step."""
    random = step_generator(seed, step)
    chosen = torch.randint(len(data), (size,), generator=random)
    clean = data.values[chosen].float()
    noise = torch.randn(clean.shape, generator=random)
    times = torch.randint(len(schedule.signal), (size,), generator=random)
    prompts = data.prompts[chosen].clone()
    prompts[torch.rand(size, generator=random) < EMPTY_SHARE] = EMPTY
    return Noised(*_noised(schedule, clean, noise, times), prompts)


def _noised(schedule: Schedule, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    states, aims = schedule.noised(clean, noise, times)
    return states, times, aims


def held_out_batches(data: Latents, schedule: Schedule, times: tuple[int, ...], seed: int = 9) -> list[Noised]:
    """All latents at each of the noise levels, with noise that every model is given alike."""
    batches = []
    for place, time in enumerate(times):
        clean = data.values.float()
        noise = torch.randn(clean.shape, generator=step_generator(seed, place))
        at = torch.full((len(clean),), time)
        batches.append(Noised(*_noised(schedule, clean, noise, at), data.prompts))
    return batches


@torch.no_grad()
def ddim(
    denoise: Denoiser, schedule: Schedule, noise: Tensor, words: Tensor, empty: Tensor | None, steps: int
) -> list[Tensor]:
    """Every state of a DDIM run, from ``noise`` to the picture: steps + 1 tensors (n, 8, 16, 16).

    ``words`` are the prompts' embeddings (n, 16, 64), ``empty`` is the empty prompt's (1, 16, 64), for
    guidance at `GUIDANCE`; None runs without.
    """
    states, times = [noise], schedule.times(steps)
    for now, after in itertools.pairwise(times):
        state = states[-1]
        at = torch.full((len(state),), now)
        if empty is None:
            v = denoise(state, at, words)
        else:
            both = torch.cat([words, empty.expand_as(words)])
            with_words, without = denoise(state.repeat(2, 1, 1, 1), at.repeat(2), both).chunk(2)
            v = without + GUIDANCE * (with_words - without)
        states.append(schedule.step(state, v, at, torch.full_like(at, after)))
    return states


def save(path: Path, value: object) -> None:
    """`torch.save`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    torch.save(value, beside)
    beside.replace(path)
