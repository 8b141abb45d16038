"""Delta sampling: what an adapter changes in the old base's picture at a noise level, added to the new base's.

Delta Sampling (arXiv 2512.03056): ε' = ε_new + λ (ε_old+adapter − ε_old), taken between predictions of the picture x̂,
guided, at one noise level. Here the state is the new base's own, read in the old base's format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.adapter import Adapter
from regraft.base import open_base
from regraft.bridge.adapted import PlugIns, check_drawing
from regraft.bridge.control import Control, check_image, controlled, standing_in
from regraft.bridge.guided import Prompted
from regraft.bridge.latent_spaces import SharedLatents, ThroughPixels, noise_of, own_shape, same_latents
from regraft.bridge.levels import Levels
from regraft.errors import InputError, RegraftError
from regraft.runtime.both import BothModels, twin
from regraft.runtime.libraries import library, quiet_libraries
from regraft.runtime.load import Loaded

#: λ, or λ at a share of the sampling that is done, from 0 to below 1.
Strength = float | Callable[[float], float]
#: λ as settings hold it: one number, or what it is at the beginning and what it comes to at the end.
Course = float | tuple[float, float]
Generators = torch.Generator | Sequence[torch.Generator] | None


class DeltaPipeline(PlugIns):
    """The new base's pipeline with what the adapter does to the old base added at each step of its sampler.

    A step costs the new base's pass and two of the old one, each doubled by guidance; with strength 0 the old base is
    not run. Where the autoencoders differ, a step decodes three pictures and encodes three.

    Attributes:
        old: the base that the adapter was trained on.
        controlnet: one of those, where it is given.
        new: the base that is bridged to.
        shared: whether both encode pictures alike.
    """

    def __init__(self, old: Loaded, new: Loaded, adapter: Adapter | None = None, controlnet: Any = None) -> None:
        """Nothing is run yet.

        Args:
            old: a pipeline from prompts to pictures.
            new: another; autoencoder, schedule and what is predicted may differ.
            adapter: for ``old``, of any kind that changes weights; None where a ControlNet is the only plug-in, or
                `load_lora_weights` comes later.
            controlnet: a ControlNet of diffusers for ``old``.

        Raises:
            InputError: a base is no such pipeline, has no place for a part of the adapter, or its scheduler or
                autoencoder is not one that can be converted.
        """
        check_drawing(old, new)
        # Each has its own scheduler, whose steps are counted.
        self.old, self.new = (twin(old) if old is new else old), new
        self.controlnet = controlnet
        if adapter is not None:
            self.load_lora_weights(adapter)
        self._levels = Levels(self.old), Levels(new)
        self.shared = same_latents(old, new)

    @classmethod
    def from_pretrained(
        cls,
        old: str | Path,
        new: str | Path,
        *,
        controlnet: Any = None,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> DeltaPipeline:
        """Load both bases.

        Args:
            old: folder of the old pipeline.
            new: of the new one.
            controlnet: as in `DeltaPipeline`.
            device: to run on.
            dtype: name of the one that both are held in.

        Raises:
            InputError: a base can't be loaded, or no bridge can be made between the two.
        """
        first, second = (open_base(Path(folder)) for folder in (old, new))
        remedy = "Give dtype='bfloat16', or another device."
        models = BothModels.load(first, second, device=device, dtype=dtype, remedy=remedy)
        return cls(models.old, models.new, controlnet=controlnet)

    @cached_property
    def _steered(self) -> Loaded:
        """The old base once more, for a ControlNet that is the only plug-in."""
        return twin(self.old)

    @property
    def with_adapter(self) -> Loaded:
        """The old base with the plug-ins."""
        return self._steered if self._adapted is None else self._adapted.model

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 30,
        guidance_scale: float | None = None,
        strength: Strength = 1.0,
        generator: Generators = None,
        output_type: str = "pil",
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        controlnet_conditioning_scale: float = 1.0,
        **settings: Any,
    ) -> Any:
        """Draw, as the new pipeline does.

        Args:
            prompt: one or several, for both bases.
            num_inference_steps: of the new pipeline's scheduler.
            guidance_scale: of both bases; None: each pipeline's own default.
            strength: λ, constant or by the share of the sampling that is done.
            generator: one, or one per prompt.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            negative_prompt: what guidance leads away from, for both bases.
            image: what the ControlNet is shown, one or one per prompt.
            controlnet_conditioning_scale: of the ControlNet.
            settings: further arguments of the new pipeline, such as its height and width.

        Returns:
            diffusers' ``ImagePipelineOutput``.

        Raises:
            InputError: the new pipeline packs its latents, or does not step through its scheduler; the old one can't be
                run on prompts alone.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        seeds = seeds_of(generator, len(prompts))
        check_image(self.controlnet, image)
        shown = (image, controlnet_conditioning_scale)
        run = _Run(self, prompts, negative, guidance_scale, strength, seeds, shown)
        given = {"guidance_scale": guidance_scale, "negative_prompt": negative, "generator": generator, **settings}
        given = {name: value for name, value in given.items() if value is not None}
        with run.altering(), quiet_libraries():
            made = self.new.pipeline(
                prompt=prompts, num_inference_steps=num_inference_steps, output_type=output_type, **given
            )
        if run.done == 0:
            raise InputError(f"{self.new.name} does not step through its scheduler", file=self.new.path)
        return library("diffusers").ImagePipelineOutput(images=made.images)


@dataclass
class _Run:
    """One call of the pipeline.

    Attributes:
        done: steps of the scheduler.
    """

    bridge: DeltaPipeline
    prompts: list[str]
    negative: Sequence[str] | None
    guidance: float | None
    strength: Strength
    seeds: list[int]
    shown: tuple[Any, float]
    done: int = 0
    _sides: list[Prompted] = field(default_factory=list)
    _space: SharedLatents | ThroughPixels | None = None
    _control: Control | None = None

    @contextmanager
    def altering(self) -> Iterator[None]:
        """The scheduler's steps get altered predictions inside."""
        scheduler = self.bridge.new.pipeline.scheduler
        step = scheduler.step

        @wraps(step)
        def altered(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **more: Any) -> Any:
            strength = self._strength(len(scheduler.timesteps))
            self.done += 1
            if strength != 0:
                model_output = self._altered(model_output, timestep, sample, strength)
            return step(model_output, timestep, sample, *args, **more)

        with standing_in(scheduler, "step", altered):
            yield

    def _strength(self, steps: int) -> float:
        return float(self.strength(self.done / steps)) if callable(self.strength) else self.strength

    def _altered(self, prediction: Tensor, time: Any, sample: Tensor, strength: float) -> Tensor:
        new, scheduler = self.bridge.new, self.bridge.new.pipeline.scheduler
        if sample.dim() != 4 or len(sample) != len(self.prompts):
            raise InputError(f"{new.name} does not step with one picture of latents per prompt", file=new.path)
        # Schedulers of the Euler kind keep x + r ε, and bring it to the denoiser's format with this.
        scaled = getattr(scheduler, "scale_model_input", lambda sample, time: sample)
        levels = self.bridge._levels[1]
        ratio = levels.ratio(float(time))
        u = scaled(sample, time).float()
        space = self._space_of((u.shape[2], u.shape[3]))
        self._begin(space.shape(u))
        change = space.change(self._pair, u, prediction.float(), ratio, strength)
        if not bool(change.isfinite().all()):
            raise RegraftError("the old base's predictions are no numbers (NaN)", file=self.bridge.old.path)
        return prediction + (change / levels.slope(ratio)).to(prediction)

    def _space_of(self, shape: tuple[int, int]) -> SharedLatents | ThroughPixels:
        if self._space is None:
            (old, new), model = self.bridge._levels, self.bridge.old
            noise = None if self.bridge.shared else noise_of(model, own_shape(model, shape), self.seeds)
            self._space = SharedLatents(old, new) if noise is None else ThroughPixels(old, new, noise)
        return self._space

    def _begin(self, shape: tuple[int, int]) -> None:
        if not self._sides:
            models = (self.bridge.old, self.bridge.with_adapter)
            self._sides = [Prompted.of(m, self.prompts, self.negative, self.guidance, shape) for m in models]
            if self.bridge.controlnet is not None:
                image, scale = self.shown
                self._control = Control.of(
                    self.bridge.controlnet, self.bridge.old, image, len(self.prompts), shape, scale
                )

    def _pair(self, z: Tensor, time: float) -> tuple[Tensor, Tensor]:
        without, adapted = self._sides
        with controlled(adapted.model.main, self._control):
            return without.predict(z, time), adapted.predict(z, time)


def strength_of(course: Course) -> Strength:
    """λ by the share of the sampling that is done, on a straight line between its two ends."""
    if not isinstance(course, tuple):
        return course
    first, last = course
    return lambda done: first + (last - first) * done


def seeds_of(generator: Generators, n: int) -> list[int]:
    """A seed for each of ``n`` pictures: of its generator; counted on from the only one's; or drawn."""
    if generator is None:
        # From torch's own, as diffusers draws its noise then.
        return [int(seed) for seed in torch.randint(1 << 31, (n,))]
    if isinstance(generator, torch.Generator):
        return [generator.initial_seed() + i for i in range(n)]
    return [one.initial_seed() for one in generator]
