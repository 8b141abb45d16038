"""The mapper: what the old denoiser's decoder holds, put into the form that the new one's holds it in.

X-Adapter (arXiv 2312.02238, eqs. 2 and 3): per level a stack of residual blocks, and a convolution that begins at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.errors import InputError

#: How a level's map joins the new base's: added; between the two; or as a scale and shift of the normalised one.
Fusion = Literal["add", "guided", "spade"]

# Of the embedding of noise levels.
_TIME = 64


@dataclass(frozen=True)
class Level:
    """One level: a block of the old denoiser, and the block of the new one that hears of it.

    Attributes:
        old: path of the old block.
        new: path of the new block.
        inner: channels of the old block's map.
        outer: channels of the new block's map.
        grows: the first residual block doubles the size (a transposed convolution).
    """

    old: str
    new: str
    inner: int
    outer: int
    grows: bool = False


@dataclass(frozen=True)
class MapperConfig:
    """What a mapper is built from.

    Attributes:
        levels: from the coarse to the fine.
        blocks: residual blocks of a level.
        fusion: see `Fusion`.
        timed: the blocks are told both noise levels.
        lead: least share of the new base's noise that the old one saw in training, in σ / α.
    """

    levels: tuple[Level, ...]
    blocks: int = 3
    fusion: Fusion = "add"
    timed: bool = False
    lead: float = 1.0

    def __post_init__(self) -> None:
        """Fail early.

        Raises:
            InputError: no such fusion, no levels, or two for one block.
        """
        joined = [level.new for level in self.levels]
        if not joined or self.blocks < 1:
            raise InputError("a mapper has at least one level, of at least one block")
        if len(set(joined)) < len(joined):
            raise InputError("two levels join one block of the new base", remedy="Name another block for one of them.")
        if self.fusion not in get_args(Fusion):
            raise InputError(f"no such fusion: {self.fusion}", remedy=f"One of {', '.join(get_args(Fusion))}.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> MapperConfig:
        """The inverse of `to_json`.

        Raises:
            InputError: it is something else.
        """
        try:
            return cls(**{**value, "levels": tuple(Level(**level) for level in value["levels"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError("does not describe a mapper") from error


class Mapper(nn.Module):
    """Maps of the old denoiser's blocks → what joins the new one's, level by level."""

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = nn.ModuleList(_LevelMapper(level, config) for level in config.levels)
        self.times = nn.Sequential(nn.Linear(2 * _TIME, _TIME), nn.SiLU()) if config.timed else None

    def forward(self, level: int, x: Tensor, hidden: Tensor, noise: Tensor | None, strength: float = 1.0) -> Tensor:
        """A new block's map with what its level says of it.

        Args:
            level: its number.
            x: the old block's map, (n, inner, height, width).
            hidden: the new block's, (n, outer, height, width).
            noise: noise levels of the new and of the old base's states, σ / (α + σ), (n, 2); for a timed mapper.
            strength: 0 leaves it as it is.
        """
        told = None
        if self.times is not None:
            assert noise is not None
            told = self.times(_embedded(noise))
        shape = self.config.levels[level]
        if (x.shape[1], hidden.shape[1]) != (shape.inner, shape.outer):
            raise InputError(
                f"the mapper leads from {shape.inner} to {shape.outer} channels at {shape.old}, and these bases have "
                f"{x.shape[1]} and {hidden.shape[1]}",
                remedy="Take the mapper of this pair.",
            )
        said: Tensor = self.levels[level](x, tuple(hidden.shape[2:]), told).to(hidden)
        if self.config.fusion == "guided":
            return hidden + strength * (said - hidden)
        if self.config.fusion == "spade":
            gain, shift = said.chunk(2, dim=1)
            # Unlike SPADE's own (arXiv 1903.07291), it begins as the identity: a frozen base has to go on working.
            return hidden + strength * (gain * F.instance_norm(hidden) + shift)
        return hidden + strength * said

    @torch.no_grad()
    def settle(self, maps: Sequence[Sequence[Tensor]]) -> None:
        """Have each level read its maps at mean 0 and deviation 1 per channel, as measured on some.

        Args:
            maps: per pass, those of each level.
        """
        for i, level in enumerate(self.levels):
            assert isinstance(level, _LevelMapper)
            seen = torch.cat([part[i].float().transpose(0, 1).flatten(1) for part in maps], dim=1)
            level.mean.copy_(seen.mean(1))
            level.spread.copy_(seen.std(1).clamp_min(1e-3))


class _LevelMapper(nn.Module):
    """The residual blocks of a level."""

    mean: Tensor
    spread: Tensor

    def __init__(self, level: Level, config: MapperConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(level.inner))
        self.register_buffer("spread", torch.ones(level.inner))
        self.blocks = nn.ModuleList(
            _Residual(level.inner if i == 0 else level.outer, level.outer, config.timed, level.grows and i == 0)
            for i in range(config.blocks)
        )
        self.out = nn.Conv2d(level.outer, level.outer * (2 if config.fusion == "spade" else 1), 1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, size: tuple[int, int], told: Tensor | None) -> Tensor:
        x = (x.to(self.mean) - self.mean[:, None, None]) / self.spread[:, None, None]
        for block in self.blocks:
            x = block(x, size, told)
        said: Tensor = self.out(_resized(x, size))
        return said


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int, timed: bool, grows: bool) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose2d(inner, inner, 3, stride=2, padding=1) if grows else None
        self.widen = nn.Conv2d(inner, outer, 3, padding=1) if inner != outer else None
        self.first = nn.Conv2d(outer, outer, 3, padding=1)
        self.second = nn.Conv2d(outer, outer, 3, padding=1)
        self.time = nn.Linear(_TIME, outer) if timed else None

    def forward(self, x: Tensor, size: tuple[int, int], told: Tensor | None) -> Tensor:
        if self.grow is not None:
            # A transposed convolution of stride 2 gives 2 n − 1 or 2 n cells; another size is met at the end.
            near = [min(max(side, 2 * n - 1), 2 * n) for side, n in zip(size, x.shape[2:], strict=True)]
            x = self.grow(x, near)
        if self.widen is not None:
            x = self.widen(x)
        h = self.first(x)
        if self.time is not None and told is not None:
            h = h + self.time(told)[:, :, None, None]
        made: Tensor = x + self.second(F.relu(h))
        return made


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", antialias=True, align_corners=False)


def _embedded(noise: Tensor) -> Tensor:
    """Sines and cosines of noise levels from 0 to 1, (n, 2) → (n, 2 · _TIME)."""
    half = _TIME // 2
    speeds = torch.exp(torch.linspace(math.log(1.0), math.log(1000.0), half, device=noise.device))
    angles = noise.float()[..., None] * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
