"""What the adapter changes in the picture at one step, from the old base's space of latents to the new one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.bridge.levels import Levels
from regraft.errors import InputError
from regraft.runtime.latents import Latents
from regraft.runtime.load import Loaded

#: A state of the old base and its timestep → the guided predictions without and with the adapter.
Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def same_latents(old: Loaded, new: Loaded) -> bool:
    """Whether two pipelines encode pictures alike, up to the scale and shift of their latents.

    Only what encodes is compared: a decoder that was trained on reads the same latents.

    Raises:
        InputError: a pipeline has no autoencoder of one scale and shift.
    """
    for model in (old, new):
        vae = getattr(model.pipeline, "vae", None)
        config = getattr(vae, "config", None)
        if not hasattr(config, "scaling_factor") or getattr(config, "latents_mean", None) is not None:
            raise InputError(f"{model.name} has no autoencoder whose latents could be converted", file=model.path)
    ours, theirs = (_encoder(model.pipeline.vae) for model in (old, new))
    return ours.keys() == theirs.keys() and all(_alike(value, theirs[name]) for name, value in ours.items())


def _alike(first: Tensor, second: Tensor) -> bool:
    """Equal but for rounding to half precision, in which the smallest values are lost."""
    if first.shape != second.shape:
        return False
    a, b = first.float(), second.float().to(first.device)
    return bool((a - b).norm() <= 1e-2 * a.norm() + 1e-6 * a.numel() ** 0.5)


def _encoder(vae: Any) -> dict[str, Tensor]:
    return {name: value for name, value in vae.state_dict().items() if name.startswith(("encoder", "quant_conv"))}


@dataclass(frozen=True)
class SharedLatents:
    """One autoencoder: latents differ by scale and shift alone.

    With x_old = c x_new + d, the state x_new + r ε is one of the old base's, x_old + c r ε: only the noise level that
    it is read at differs, and no picture is decoded.
    """

    old: Levels
    new: Levels

    def change(self, pair: Pair, u: Tensor, prediction: Tensor, ratio: float, strength: float) -> Tensor:
        """λ (x̂_old+adapter − x̂_old) in the new base's latents, (n, channels, height, width).

        Args:
            pair: the old base.
            u: the new base's state as its denoiser reads it.
            prediction: the new base's.
            ratio: r of the state.
            strength: λ.
        """
        (theirs, shift), (ours, its_shift) = (Latents(side.model).scale for side in (self.old, self.new))
        c, d = theirs / ours, (its_shift - shift) * theirs
        return shared_change(pair, u, ratio, strength, self.old, self.new, c, d)

    def shape(self, u: Tensor) -> tuple[int, int]:
        """Height and width of the old base's latents for states of the new one."""
        return int(u.shape[2]), int(u.shape[3])


class NoiseLevels(Protocol):
    """Noise levels of a model as r = σ / α of its states α x + σ ε; those of a pipeline are `Levels`."""

    def ratio(self, time: float, /) -> float:
        """r at a timestep."""
        ...

    def time(self, ratio: float, /) -> float:
        """The timestep of r; the nearest one where the schedule has no such level."""
        ...

    def mix(self, ratio: float, /) -> tuple[float, float]:
        """α and σ at r."""
        ...

    def slope(self, ratio: float, /) -> float:
        """d x̂ / d prediction."""
        ...


def shared_change(
    pair: Pair,
    u: Tensor,
    ratio: float,
    strength: float,
    old: NoiseLevels,
    new: NoiseLevels,
    c: float = 1.0,
    d: float = 0.0,
) -> Tensor:
    """λ (x̂_old+adapter − x̂_old) in the new base's latents, of the shape of ``u``.

    Args:
        pair: the old base.
        u: the new base's state as its denoiser reads it.
        ratio: r of the state.
        strength: λ.
        old: levels of the old base.
        new: and of the new one.
        c: latents of the old base are c x + d of the new one's.
        d: likewise.
    """
    alpha, sigma = new.mix(ratio)
    time = old.time(c * ratio)
    level = old.ratio(time)
    keeps, noise = old.mix(level)
    # Both states brought to α² + σ² = 1: where the old schedule ends before the new one, its last level is meant.
    z = (c * u + d * alpha) * ((keeps**2 + noise**2) / (alpha**2 + (c * sigma) ** 2)) ** 0.5
    without, adapted = pair(z, time)
    return strength * old.slope(level) / c * (adapted - without)


@dataclass(frozen=True)
class ThroughPixels:
    """Two autoencoders: the new base's picture so far is seen by the old one, and its change seen by the new one.

    Attributes:
        old: levels of the old base.
        new: and of the new one.
        noise: of the old base's states, (n, channels, height, width): the same at every step, as a sampler has it.
    """

    old: Levels
    new: Levels
    noise: Tensor

    def change(self, pair: Pair, u: Tensor, prediction: Tensor, ratio: float, strength: float) -> Tensor:
        """As `SharedLatents.change`; the change of the picture is taken between pictures."""
        ours, theirs = Latents(self.old.model), Latents(self.new.model)
        picture = theirs.decode(self.new.clean(prediction, u, ratio))
        time = self.old.time(ratio)
        level = self.old.ratio(time)
        factor = getattr(self.old.model.pipeline, "vae_scale_factor", 8)
        size = [side * factor for side in self.noise.shape[2:]]
        keeps, noise = self.old.mix(level)
        clean = ours.encode(resized(picture, size).to(self.noise.device))
        z = keeps * clean + noise * self.noise
        without, adapted = (ours.decode(self.old.clean(found, z, level)) for found in pair(z, time))
        moved = resized(adapted - without, list(picture.shape[2:])).to(picture.device)
        changed = (picture + strength * moved).clamp(-1, 1)
        return (theirs.encode(changed) - theirs.encode(picture)).to(u.device)

    def shape(self, u: Tensor) -> tuple[int, int]:
        """As `SharedLatents.shape`: the old base's own size."""
        return int(self.noise.shape[2]), int(self.noise.shape[3])


def noise_of(model: Loaded, size: tuple[int, int], seeds: Sequence[int], draws: int = 1) -> Tensor:
    """Noise in a base's latents, (n, channels, height, width).

    Args:
        model: the base.
        size: height and width.
        seeds: one per picture.
        draws: which draw of each seed's is taken; the first is what the base's own pipeline begins from.
    """
    shape = (model.pipeline.vae.config.latent_channels, *size)
    several = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        several.append([torch.randn(shape, generator=generator) for _ in range(draws)][-1])
    return torch.stack(several).to(model.device)


def own_shape(model: Loaded, like: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of the latents that a model was trained at; with another aspect, about as many cells of them.

    Args:
        model: a pipeline.
        like: height and width whose aspect is wanted.
    """
    size = getattr(model.main.config, "sample_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    if like is None or like[0] * width == like[1] * height:
        return int(height), int(width)
    aspect = (like[0] / like[1]) ** 0.5
    side = (height * width) ** 0.5
    # Halved by each of a U-Net's down blocks: eight cells divide evenly for all that are in use.
    first, second = (max(8, 8 * round(part / 8)) for part in (side * aspect, side / aspect))
    return first, second


def resized(pictures: Tensor, size: list[int]) -> Tensor:
    """Pictures (n, channels, height, width) at another height and width."""
    if list(pictures.shape[2:]) == size:
        return pictures
    return F.interpolate(pictures, size, mode="bilinear", antialias=True, align_corners=False)
