"""One run of both bases through a mapper, step by step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.bridge.control import Control, controlled
from regraft.bridge.delta import Generators, Strength, seeds_of
from regraft.bridge.guided import Prompted
from regraft.bridge.latent_spaces import noise_of, resized
from regraft.bridge.levels import Levels
from regraft.bridge.x_adapter.lesson import changes_of
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.places import changed, heard
from regraft.bridge.x_adapter.settings import Reading
from regraft.errors import InputError, RegraftError
from regraft.runtime.both import Side
from regraft.runtime.latents import Latents
from regraft.runtime.libraries import library


@dataclass(frozen=True)
class _Said:
    """What the old base said at a step.

    Attributes:
        maps: of its blocks, in the order of the mapper's levels.
        ratio: σ / α that it was heard at.
    """

    maps: list[Tensor]
    ratio: float


@dataclass
class Sampling:
    """One call of `regraft.bridge.x_adapter.pipeline.BridgePipeline`, whose arguments its fields are.

    Attributes:
        levels: of the old and the new base.
        old: the old base as it draws, with its plug-ins.
        reader: the old base as it is heard.
        new: the new base.
        scheduler: a copy of the new base's, set to its steps.
        control: of the ControlNet.
        shapes: height and width of the old and the new base's latents.
        turn: brings one of the bases to the device.
        ahead: all that the old base has to say is said before the new one's turn.
    """

    levels: tuple[Levels, Levels]
    old: Prompted
    reader: Prompted
    new: Prompted
    scheduler: Any
    mapper: Mapper
    control: Control | None
    generator: Generators
    shapes: tuple[tuple[int, int], tuple[int, int]]
    strength: Strength
    start: float
    reading: Reading
    lead: float
    turn: Callable[[Side], None]
    ahead: bool

    def draw(self) -> Tensor:
        """The new base's finished latents."""
        times = list(self.scheduler.timesteps)
        ratios = [self.levels[1].ratio(float(time)) for time in times]
        alone = self._joins(times)
        n = self.new.pictures
        seeds = seeds_of(self.generator, n)
        # What the old base's pipeline would begin from; and further draws, for its picture has that noise in it.
        self.old_noise = noise_of(self.old.model, self.shapes[0], seeds)
        self.further = noise_of(self.old.model, self.shapes[0], seeds, draws=2)
        self.new_noise = self._new_noise(n)
        drawing = self.reading == "drawing"
        self.turn("old")
        with self._controlled(self.old):
            z, clean = self._alone(ratios, alone if drawing else len(ratios))
        picture = None if clean is None or alone == 0 else Latents(self.old.model).decode(clean)
        controls = nullcontext() if self.reading == "plain" else self._controlled(self.reader)
        places = [level.old for level in self.mapper.config.levels]
        said: dict[int, _Said] = {}
        with controls, heard(self.reader.model.main, places, self.shapes[0]) as maps:
            if self.ahead and clean is not None and not drawing:
                # All that the old base has to say, so that it need not take turns at every step.
                said = {i: self._read(clean, ratios[i], maps, "cpu") for i in range(alone, len(times))}
            self.turn("new")
            latents = self._begin(picture, times, alone)
            for i in range(alone, len(times)):
                strength = float(self.strength(i / len(times))) if callable(self.strength) else self.strength
                heard_now = said.get(i)
                if drawing:
                    self.turn("old")
                    after = ratios[i + 1] if i + 1 < len(ratios) else 0.0
                    z, _ = self._step(z, ratios[i], after)
                    heard_now = _Said(list(maps), self._own(ratios[i]))
                elif heard_now is None and strength != 0:
                    assert clean is not None
                    heard_now = self._read(clean, ratios[i], maps)
                self.turn("new")
                latents = self._new_step(latents, times[i], ratios[i], heard_now, strength)
        return latents

    def _controlled(self, side: Prompted) -> AbstractContextManager[None]:
        return controlled(side.model.main, self.control)

    def _joins(self, times: list[Any]) -> int:
        """The first step of the new base's."""
        most = self.start * Latents(self.new.model).steps
        found = next((i for i, time in enumerate(times) if float(time) <= most), len(times) - 1)
        # Samplers of the second order, such as Heun's, take two calls for a step.
        order = int(getattr(self.scheduler, "order", 1))
        if found > 0 and getattr(self.scheduler.config, "skip_prk_steps", True) is False:
            raise InputError(
                f"a {type(self.scheduler).__name__} begins with steps of its own, and can't be joined midway",
                file=self.new.model.path,
                remedy="Give start 1, or another scheduler.",
            )
        return min(-(-found // order) * order, (len(times) - 1) // order * order)

    def _new_noise(self, n: int) -> Tensor:
        """As the new base's pipeline draws it."""
        model = self.new.model
        channels = int(model.pipeline.vae.config.latent_channels)
        given = (
            self.generator
            if self.generator is None or isinstance(self.generator, torch.Generator)
            else list(self.generator)
        )
        drawn: Tensor = library("diffusers.utils.torch_utils").randn_tensor(
            (n, channels, *self.shapes[1]), generator=given, device=torch.device(model.device), dtype=torch.float32
        )
        return drawn

    def _alone(self, ratios: list[float], steps: int) -> tuple[Tensor, Tensor | None]:
        """The old base's state and picture after so many of the steps; no picture before any."""
        z, clean = self.old_noise, None
        for i, ratio in enumerate(ratios[:steps]):
            after = ratios[i + 1] if i + 1 < len(ratios) else 0.0
            z, clean = self._step(z, ratio, after)
        return z, clean

    def _step(self, z: Tensor, ratio: float, after: float) -> tuple[Tensor, Tensor]:
        """A step of the old base from one noise level to another (DDIM, arXiv 2010.02502, eq. 12), and its picture."""
        levels = self.levels[0]
        time = levels.time(ratio)
        level = levels.ratio(time)
        clean = levels.clean(self.old.predict(z, time), z, level)
        if not bool(clean.isfinite().all()):
            raise RegraftError("the old base's predictions are no numbers (NaN)", file=self.old.model.path)
        alpha, sigma = levels.mix(level)
        noise = (z - alpha * clean) / max(sigma, 1e-4)
        alpha, sigma = levels.mix(min(after, level))
        return alpha * clean + sigma * noise, clean

    def _own(self, ratio: float) -> float:
        """σ / α of the old base's level that is nearest."""
        return self.levels[0].ratio(self.levels[0].time(ratio))

    def _read(self, clean: Tensor, ratio: float, maps: list[Tensor], place: str | None = None) -> _Said:
        """The finished picture is read, under a share of the new base's noise."""
        level = self._own(self.lead * ratio)
        alpha, sigma = self.levels[0].mix(level)
        self.reader.predict(alpha * clean + sigma * self.further, self.levels[0].time(level))
        return _Said([part if place is None else part.to(place) for part in maps], level)

    def _begin(self, picture: Tensor | None, times: list[Any], alone: int) -> Tensor:
        """The new base's first state: noise, or the old base's picture under noise."""
        noise = self.new_noise
        if hasattr(self.scheduler, "set_begin_index"):
            # It has seen the pipeline's first call already, and counts from there.
            self.scheduler._step_index = None
            self.scheduler.set_begin_index(alone)
        if picture is None:
            return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        factor = getattr(self.new.model.pipeline, "vae_scale_factor", 8)
        given = Latents(self.new.model).encode(resized(picture, [side * factor for side in self.shapes[1]])).to(noise)
        mixed = getattr(self.scheduler, "scale_noise", None)
        time = torch.as_tensor(times[alone]).reshape(1)
        started: Tensor = mixed(given, time, noise) if mixed else self.scheduler.add_noise(given, noise, time)
        return started

    def _new_step(self, latents: Tensor, time: Any, ratio: float, said: _Said | None, strength: float) -> Tensor:
        scaled = getattr(self.scheduler, "scale_model_input", lambda sample, time: sample)
        u = scaled(latents, time)
        with self._speaking(strength, ratio, said):
            prediction = self.new.predict(u, float(time))
        if not bool(prediction.isfinite().all()):
            raise RegraftError("the new base's predictions are no numbers (NaN)", file=self.new.model.path)
        # Some samplers add noise of their own at each step.
        accepted = inspect.signature(self.scheduler.step).parameters
        drawn = {"generator": self.generator} if "generator" in accepted else {}
        made: Tensor = self.scheduler.step(prediction.to(latents), time, latents, **drawn).prev_sample
        return made

    @contextmanager
    def _speaking(self, strength: float, ratio: float, said: _Said | None) -> Iterator[None]:
        if strength == 0 or said is None:
            yield
            return
        rows = self.new.rows
        maps = [_rows(part, rows) for part in said.maps]
        shares = [one / (1 + one) for one in (ratio, said.ratio)]
        noise = torch.tensor([shares], device=self.new.model.device).expand(rows, 2)
        with changed(self.new.model.main, changes_of(self.mapper, maps, noise, strength), self.shapes[1]):
            yield


def _rows(maps: Tensor, rows: int) -> Tensor:
    """The maps for as many rows: guidance runs a base on twice the pictures, without the prompt first."""
    if len(maps) == rows:
        return maps
    return maps[-rows:] if len(maps) > rows else maps.repeat(rows // len(maps), 1, 1, 1)
