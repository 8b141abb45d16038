"""Pictures in other colours under the same words: what a mapper has to take from the old base, for no prompt tells it.

A mapper that has only seen plain pictures learns to listen to what is drawn, not to how.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rec. 601, as the eye weighs red, green and blue.
_LIGHT = (0.299, 0.587, 0.114)


def varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture in colours of its own, (n, 3, height, width) from −1 to 1.

    In turns: two tones at random (by lightness, or by lightness turned about), channels mixed at random, and lightness
    bent by a random exponent with a random tint.

    Args:
        pictures: (n, 3, height, width), from −1 to 1.
        generator: of the colours.
    """
    made = [_KINDS[i % len(_KINDS)](picture, generator) for i, picture in enumerate(pictures)]
    return torch.stack(made).clamp(-1, 1)


def _two_tones(picture: Tensor, generator: torch.Generator) -> Tensor:
    light = _light(picture)
    if torch.rand(1, generator=generator) < 0.5:
        light = 1 - light
    # Stretched, so that both tones are there.
    low, high = light.quantile(0.02), light.quantile(0.98)
    light = ((light - low) / (high - low).clamp_min(0.05)).clamp(0, 1)
    paper, ink = torch.rand(2, 3, 1, 1, generator=generator) * 2 - 1
    made: Tensor = paper + light * (ink - paper)
    return made


def _mixed(picture: Tensor, generator: torch.Generator) -> Tensor:
    mixing = torch.eye(3) + 0.5 * torch.randn(3, 3, generator=generator)
    mixing = mixing / mixing.abs().sum(1, keepdim=True)
    shift = 0.3 * torch.randn(3, 1, 1, generator=generator)
    return torch.einsum("ij,jhw->ihw", mixing.to(picture), picture) * 1.2 + shift


def _tinted(picture: Tensor, generator: torch.Generator) -> Tensor:
    exponent = torch.exp(0.6 * torch.randn(1, generator=generator))
    light = ((picture + 1) / 2).clamp(0, 1) ** float(exponent)
    tint = 0.4 + 0.6 * torch.rand(3, 1, 1, generator=generator)
    return light * tint * 2 - 1


def _light(picture: Tensor) -> Tensor:
    weights = torch.tensor(_LIGHT)[:, None, None].to(picture)
    return ((picture + 1) / 2 * weights).sum(0, keepdim=True)


_KINDS = (_two_tones, _mixed, _two_tones, _tinted)
