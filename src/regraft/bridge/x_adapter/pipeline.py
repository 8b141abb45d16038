"""Sampling through a mapper: the old base draws with its plug-ins, and the new one hears of it at every step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
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
from regraft.runtime.both import BothModels, twin
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

    def __init__(self, old: Loaded, new: Loaded, mapper: Mapper, controlnet: Any = None) -> None:
        """Nothing is run yet.

        Args:
            old: a pipeline from prompts to pictures.
            new: another; autoencoder, schedule, size and what is predicted may differ.
            mapper: trained for the two.
            controlnet: a ControlNet of diffusers for ``old``.

        Raises:
            InputError: a base is no such pipeline, its scheduler or autoencoder is not one that can be converted, or
                it lacks a block of the mapper's.
        """
        check_drawing(old, new)
        self.old, self.new, self.mapper = (twin(old) if old is new else old), new, mapper.eval().to(new.device)
        self.controlnet = controlnet
        self._levels = Levels(self.old), Levels(new)
        self._adapted: Adapted | None = None
        for model, names in (
            (old, [(level.old, level.inner) for level in mapper.config.levels]),
            (new, [(level.new, level.outer) for level in mapper.config.levels]),
        ):
            _check_blocks(model, names)

    @classmethod
    def from_pretrained(
        cls, old: str | Path, new: str | Path, mapper: str | Path, *, controlnet: Any = None, device: str = "cpu"
    ) -> BridgePipeline:
        """Load both bases and their mapper.

        Args:
            old: folder of the old pipeline.
            new: of the new one.
            mapper: a file of `regraft bridge train`, or the released X_Adapter_v1.bin.
            controlnet: as in `BridgePipeline`.
            device: to run on.

        Raises:
            InputError: a base can't be loaded, or the mapper is for other bases.
        """
        first, second = open_base(Path(old)), open_base(Path(new))
        found = load_mapper(Path(mapper), first, second)
        models = BothModels.load(first, second, device=device)
        return cls(models.old, models.new, found, controlnet)

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
            control = self._control(image, controlnet_conditioning_scale, len(prompts), old, old_shape)
            drawer = Prompted.of(old, prompts, negative, guidance_scale, old_shape)
            new = Prompted.of(self.new, told, negative, new_guidance_scale, shape, num_inference_steps)
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
            )
            latents = run.draw()
            images = latents if output_type == "latent" else self._pictures(latents, output_type)
        return library("diffusers").ImagePipelineOutput(images=images)

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
    _maps: list[Tensor] = field(default_factory=list)

    def draw(self) -> Tensor:
        """The new base's finished latents."""
        times = list(self.scheduler.timesteps)
        ratios = [self.levels[1].ratio(float(time)) for time in times]
        alone = self._joins(times)
        places = [level.old for level in self.mapper.config.levels]
        n = self.new.pictures
        seeds = seeds_of(self.generator, n)
        # What the old base's pipeline would begin from; and further draws, for its picture has that noise in it.
        self.old_noise = noise_of(self.old.model, self.shapes[0], seeds)
        self.further = noise_of(self.old.model, self.shapes[0], seeds, draws=2)
        self.new_noise = self._new_noise(n)
        drawing = self.reading == "drawing"
        with self._controlled(self.old):
            z, clean = self._alone(ratios, alone if drawing else len(ratios))
        latents = self._begin(clean, times, alone)
        controls = nullcontext() if self.reading == "plain" else self._controlled(self.reader)
        with controls, heard(self.reader.model.main, places, self.shapes[0]) as maps:
            self._maps = maps
            for i in range(alone, len(times)):
                ratio = ratios[i]
                if drawing:
                    after = ratios[i + 1] if i + 1 < len(ratios) else 0.0
                else:
                    assert clean is not None
                    z, after = self._renoised(clean, self.lead * ratio), None
                latents, z = self._both(latents, z, times[i], ratio, after, i / len(times))
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

    def _renoised(self, clean: Tensor, ratio: float) -> Tensor:
        alpha, sigma = self.levels[0].mix(self.levels[0].ratio(self.levels[0].time(ratio)))
        return alpha * clean + sigma * self.further

    def _begin(self, clean: Tensor | None, times: list[Any], alone: int) -> Tensor:
        """The new base's first state: noise, or the old base's picture under noise."""
        noise = self.new_noise
        if hasattr(self.scheduler, "set_begin_index"):
            # It has seen the pipeline's first call already, and counts from there.
            self.scheduler._step_index = None
            self.scheduler.set_begin_index(alone)
        if alone == 0 or clean is None:
            return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        new = Latents(self.new.model)
        factor = getattr(self.new.model.pipeline, "vae_scale_factor", 8)
        picture = Latents(self.old.model).decode(clean)
        given = new.encode(resized(picture, [side * factor for side in self.shapes[1]])).to(noise)
        mixed = getattr(self.scheduler, "scale_noise", None)
        time = torch.as_tensor(times[alone]).reshape(1)
        started: Tensor = mixed(given, time, noise) if mixed else self.scheduler.add_noise(given, noise, time)
        return started

    def _both(
        self, latents: Tensor, z: Tensor, time: Any, ratio: float, after: float | None, done: float
    ) -> tuple[Tensor, Tensor]:
        """A step of both; the old base makes none of its own where its picture is finished (``after`` None)."""
        strength = float(self.strength(done)) if callable(self.strength) else self.strength
        scaled = getattr(self.scheduler, "scale_model_input", lambda sample, time: sample)
        levels = self.levels[0]
        level = levels.ratio(levels.time(ratio if after is not None else self.lead * ratio))
        # Where nothing is heard, and nothing further is drawn, the old base need not run.
        if after is not None:
            z, _ = self._step(z, ratio, after)
        elif strength != 0:
            self.reader.predict(z, levels.time(level))
        u = scaled(latents, time)
        with self._speaking(strength, (ratio, level)):
            prediction = self.new.predict(u, float(time))
        if not bool(prediction.isfinite().all()):
            raise RegraftError("the new base's predictions are no numbers (NaN)", file=self.new.model.path)
        # Some samplers add noise of their own at each step.
        drawn = (
            {"generator": self.generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        )
        made: Tensor = self.scheduler.step(prediction.to(latents), time, latents, **drawn).prev_sample
        return made, z

    @contextmanager
    def _speaking(self, strength: float, ratios: tuple[float, float]) -> Iterator[None]:
        if strength == 0:
            yield
            return
        rows = self.new.rows
        maps = [_rows(part, rows) for part in self._maps]
        noise = torch.tensor([[ratio / (1 + ratio) for ratio in ratios]], device=maps[0].device).expand(rows, 2)
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
