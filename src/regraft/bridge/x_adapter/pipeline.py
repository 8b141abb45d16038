"""Sampling through a mapper: the old base draws with its plug-ins, and the new one hears of it at every step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regraft.adapter import Adapter
from regraft.base import open_base
from regraft.bridge.adapted import Adapted, check_drawing
from regraft.bridge.control import Control, check_image, controlled
from regraft.bridge.delta import Generators, Strength, seeds_of
from regraft.bridge.guided import Prompted
from regraft.bridge.latent_spaces import noise_of, own_shape, resized
from regraft.bridge.levels import Levels
from regraft.bridge.x_adapter.files import load_mapper
from regraft.bridge.x_adapter.lesson import changes_of
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.places import changed, channels_of, heard
from regraft.errors import InputError, RegraftError
from regraft.formats import load_adapter
from regraft.runtime.both import BothModels, Side, twin
from regraft.runtime.latents import Latents
from regraft.runtime.libraries import library, quiet_libraries
from regraft.runtime.load import Loaded

#: Share of the noise schedule at which the new base joins, by default: the paper's T0 (section 4.4).
START = 0.8
#: Share of the new base's noise that the old one's states have, by default.
LEAD = 0.5
#: How the old base is heard: its finished picture is read by the base without its plug-ins, or with them; or it is
#: heard while it draws, as in the paper.
Reading = Literal["plain", "plugged", "drawing"]


class BridgePipeline:
    """X-Adapter's sampling (arXiv 2312.02238, section 3.4), for the pair that a mapper was trained for.

    Attributes:
        old: the base that plug-ins are for.
        new: the base that is bridged to.
        mapper: of the pair.
        controlnet: that steers the old base, where one is given.
    """

    def __init__(
        self, old: Loaded, new: Loaded, mapper: Mapper, controlnet: Any = None, *, turns: str | None = None
    ) -> None:
        """Nothing is run yet.

        Args:
            old: a pipeline from prompts to pictures.
            new: another; autoencoder, schedule, size and what is predicted may differ.
            mapper: trained for the two.
            controlnet: a ControlNet of diffusers for ``old``.
            turns: the device that the two take turns on, so that it never holds both; None: they stay where they are.

        Raises:
            InputError: a base is no such pipeline, its scheduler or autoencoder is not one that can be converted, or
                it lacks a block of the mapper's.
        """
        check_drawing(old, new)
        self.old, self.new, self.mapper = (twin(old) if old is new else old), new, mapper.eval().to(turns or new.device)
        self.controlnet, self.turns = controlnet, turns
        self._levels = Levels(self.old), Levels(new)
        self._adapted: Adapted | None = None
        for model, names in (
            (old, [(level.old, level.inner) for level in mapper.config.levels]),
            (new, [(level.new, level.outer) for level in mapper.config.levels]),
        ):
            _check_blocks(model, names)

    @classmethod
    def from_pretrained(
        cls,
        old: str | Path,
        new: str | Path,
        mapper: str | Path,
        *,
        controlnet: Any = None,
        device: str = "cpu",
        low_memory: bool = False,
    ) -> BridgePipeline:
        """Load both bases and their mapper.

        Args:
            old: folder of the old pipeline.
            new: of the new one.
            mapper: a file of `regraft bridge train`, or the released X_Adapter_v1.bin.
            controlnet: as in `BridgePipeline`.
            device: to run on.
            low_memory: the bases take turns on the device.

        Raises:
            InputError: a base can't be loaded, or the mapper is for other bases.
        """
        first, second = open_base(Path(old)), open_base(Path(new))
        found = load_mapper(Path(mapper), first, second)
        models = BothModels.load(first, second, device=device, in_turns=low_memory)
        return cls(models.old, models.new, found, controlnet, turns=models.turns)

    def load_lora_weights(self, adapter: Adapter | str | Path) -> None:
        """Have the old base run with an adapter, of any kind that changes weights.

        Args:
            adapter: read, or the file or folder to read.

        Raises:
            InputError: it can't be read, or does not fit the old base.
        """
        read = adapter if isinstance(adapter, Adapter) else load_adapter(Path(adapter))
        self._adapted = Adapted(self.old, read)

    def unload_lora_weights(self) -> None:
        """Have the old base run as it is."""
        self._adapted = None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        num_inference_steps: int = 30,
        guidance_scale: float | None = None,
        strength: Strength = 1.0,
        generator: Generators = None,
        output_type: str = "pil",
        *,
        new_prompt: str | Sequence[str] = "",
        new_guidance_scale: float | None = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        start: float = START,
        reading: Reading = "plain",
        lead: float | None = None,
        controlnet_conditioning_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
    ) -> Any:
        """Draw.

        Args:
            prompt: one or several, for the old base.
            image: what the ControlNet is shown, one or one per prompt.
            num_inference_steps: of the new pipeline's scheduler; the old base takes the same noise levels.
            guidance_scale: of the old base; None: its pipeline's own default.
            strength: of the mapper, constant or by the share of the sampling that is done; 0 is the new base alone.
            generator: one, or one per prompt, as the new pipeline takes them; the old base's noise has the same seeds.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            new_prompt: for the new base; by default empty, as the mapper was trained with.
            new_guidance_scale: of the new base; None: its pipeline's own default. 1, the default, is no guidance.
            negative_prompt: what guidance leads away from, for both bases.
            start: share of the schedule at which the new base joins; until then the old one draws alone, and what it
                has drawn is handed over. 1: from the first step.
            reading: ``plain``: the old base draws its picture to the end with its plug-ins, and without them reads it,
                under noise, beside the new base's steps: the mapper has heard no plug-in in training. ``plugged``: it
                reads with them. ``drawing``: both draw side by side, as in the paper.
            lead: unless ``drawing``, share of the new base's noise (in σ / α) that the old one's states have; None:
                `LEAD`, or the least that the mapper was trained with where that is more.
            controlnet_conditioning_scale: of the ControlNet.
            height: of the pictures; None: what the new pipeline draws.
            width: likewise.

        Returns:
            diffusers' ``ImagePipelineOutput``.

        Raises:
            InputError: a pipeline packs its latents, can't be run on prompts alone, or draws no such size.
            RegraftError: predictions are no numbers.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        told = _several(new_prompt, len(prompts))
        negative = None if negative_prompt is None else _several(negative_prompt, len(prompts))
        shape = self._shape(height, width)
        if reading not in get_args(Reading):
            raise InputError(f"no such reading: {reading}", remedy=f"One of {', '.join(get_args(Reading))}.")
        if not 0 < start <= 1:
            raise InputError(f"start {start} is out of range", remedy="Give a share above 0, up to 1.")
        old = self.old if self._adapted is None else self._adapted.model
        old_shape = own_shape(old, shape)
        with quiet_libraries():
            self._turn("new")
            new = Prompted.of(self.new, told, negative, new_guidance_scale, shape, num_inference_steps)
            self._turn("old")
            control = self._control(image, controlnet_conditioning_scale, len(prompts), old, old_shape)
            drawer = Prompted.of(old, prompts, negative, guidance_scale, old_shape)
            reader = drawer
            if reading != "drawing":
                # No more rows than the new base hears of.
                asked = drawer.guidance if new.rows > new.pictures else 1.0
                model = self.old if reading == "plain" else old
                reader = Prompted.of(model, prompts, negative, asked, old_shape)
            run = _Run(
                self._levels,
                drawer,
                reader,
                new,
                copy.deepcopy(self.new.pipeline.scheduler),
                self.mapper,
                control,
                generator,
                (old_shape, shape),
                strength,
                start,
                reading,
                max(LEAD, self.mapper.config.lead) if lead is None else lead,
                self._turn,
                self.turns is not None,
            )
            latents = run.draw()
            images = latents if output_type == "latent" else self._pictures(latents, output_type)
        return library("diffusers").ImagePipelineOutput(images=images)

    def _turn(self, side: Side) -> None:
        """Bring one of the bases to the device, and the other away from it."""
        if self.turns is None:
            return
        olds = [self.old] if self._adapted is None else [self.old, self._adapted.model]
        for model in olds if side == "new" else [self.new]:
            model.to("cpu")
        for model in [self.new] if side == "new" else olds:
            model.to(self.turns)
        if self.controlnet is not None:
            self.controlnet.to(self.turns if side == "old" else "cpu")

    def _shape(self, height: int | None, width: int | None) -> tuple[int, int]:
        factor = getattr(self.new.pipeline, "vae_scale_factor", 8)
        native = own_shape(self.new)
        sides = [h if given is None else given // factor for h, given in zip(native, (height, width), strict=True)]
        for given in (height, width):
            if given is not None and (given % factor or given <= 0):
                raise InputError(f"draws no pictures {given} pixels long: its autoencoder needs multiples of {factor}")
        return sides[0], sides[1]

    def _control(self, image: Any, scale: float, n: int, old: Loaded, shape: tuple[int, int]) -> Control | None:
        check_image(self.controlnet, image)
        if self.controlnet is None:
            return None
        return Control.of(self.controlnet, old, image, n, shape, scale)

    def _pictures(self, latents: Tensor, output_type: str) -> Any:
        pictures = Latents(self.new).decode(latents)
        processor = library("diffusers.image_processor").VaeImageProcessor()
        return processor.postprocess(pictures.cpu(), output_type=output_type)


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
class _Run:
    """One call of the pipeline."""

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


def _check_blocks(model: Loaded, wanted: Sequence[tuple[str, int]]) -> None:
    """Raises InputError where a base lacks a block of the mapper's, or has it with other channels."""
    for name, channels in wanted:
        try:
            found = channels_of(model.main, name)
        except KeyError:
            raise InputError(f"has no block {name}, which the mapper is for", file=model.path) from None
        if found is not None and found != channels:
            what = f"has {found} channels at {name}, and the mapper is for {channels}"
            raise InputError(what, file=model.path, remedy="Take the mapper of this pair.")


def _several(text: str | Sequence[str], n: int) -> list[str]:
    return [text] * n if isinstance(text, str) else list(text)
