"""Sampling through a mapper: the old base draws with its plug-ins, and the new one hears of it at every step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from regraft.base import open_base
from regraft.bridge.adapted import PlugIns, check_drawing
from regraft.bridge.control import Control, check_image
from regraft.bridge.delta import Generators, Strength
from regraft.bridge.guided import Prompted
from regraft.bridge.latent_spaces import own_shape
from regraft.bridge.levels import Levels
from regraft.bridge.x_adapter.files import load_mapper
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.places import channels_of
from regraft.bridge.x_adapter.sampling import Sampling
from regraft.bridge.x_adapter.settings import START, Reading
from regraft.errors import InputError
from regraft.runtime.both import BothModels, Side, twin
from regraft.runtime.latents import Latents
from regraft.runtime.libraries import library, quiet_libraries
from regraft.runtime.load import Loaded

#: Share of the new base's noise that the old one's states have, by default.
LEAD = 0.5


class BridgePipeline(PlugIns):
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
        dtype: str = "float32",
        low_memory: bool = False,
    ) -> BridgePipeline:
        """Load both bases and their mapper.

        Args:
            old: folder of the old pipeline.
            new: of the new one.
            mapper: a file of `regraft bridge train`, or the released X_Adapter_v1.bin.
            controlnet: as in `BridgePipeline`.
            device: to run on.
            dtype: name of the one that both bases are held in; the mapper stays in float32.
            low_memory: the bases take turns on the device.

        Raises:
            InputError: a base can't be loaded, or the mapper is for other bases.
        """
        first, second = open_base(Path(old)), open_base(Path(new))
        found = load_mapper(Path(mapper), first, second)
        remedy = "Give dtype='bfloat16', low_memory=True, or another device."
        models = BothModels.load(first, second, device=device, in_turns=low_memory, dtype=dtype, remedy=remedy)
        return cls(models.old, models.new, found, controlnet, turns=models.turns)

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
            run = Sampling(
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
