"""Styles that a LoRA of v1 knows, drawn by v3: what each way to get them there is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.adapter import Adapter
from regraft.base import open_base
from regraft.bench import diffusion_art as art
from regraft.bench.diffusion_judge import Judge, look_number, style_share
from regraft.bench.diffusion_models import plain_attention
from regraft.bench.diffusion_recipes import ADAPTERS
from regraft.bench.diffusion_train import Workshop
from regraft.bridge.delta import DeltaPipeline, Strength
from regraft.bridge.guided import Prompted
from regraft.bridge.x_adapter.files import load_mapper
from regraft.bridge.x_adapter.pipeline import BridgePipeline
from regraft.bridge.x_adapter.settings import MapperSettings
from regraft.bridge.x_adapter.training import train_mapper
from regraft.demo import data_folder
from regraft.formats import load_adapter
from regraft.runtime import Loaded, applied, load_model
from regraft.runtime.latents import Latents

OLD, NEW = "v1", "v3"
STEPS, GUIDANCE = 20, 2.0
#: The style of the demo's committed LoRAs.
DEMO = "demo"
_GROUNDS = len(art.BACKGROUNDS)
#: Each concept on three backgrounds.
PROMPTS = tuple(
    f"{concept} on {ground}" for i, concept in enumerate(art.CONCEPTS) for ground in list(art.BACKGROUNDS)[i % 2 :: 2]
)
WANTED = np.arange(len(PROMPTS)) // (_GROUNDS // 2)

#: Pictures (n, 32, 32, 3) from 0 to 1.
Pictures = art.Floats


@dataclass
class Bench:
    """Both bases, what was trained for them, and the judge.

    Attributes:
        shop: where all of it lies.
        judge: of things and looks.
        refine_steps: of a refine's training, at most; None for its own number.
    """

    shop: Workshop
    judge: Judge
    refine_steps: int | None = None

    @cached_property
    def old(self) -> Loaded:
        return _quick(load_model(self.shop.base(OLD)))

    @cached_property
    def new(self) -> Loaded:
        return _quick(load_model(self.shop.base(NEW)))

    def mapper(self, name: str, seed: int, settings: MapperSettings) -> Path:
        """A mapper's file, which is trained if it is missing."""
        file = self.shop.cache / "bridge" / f"{name}-{seed}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            bases = [open_base(self.shop.base(which)) for which in (OLD, NEW)]
            report = train_mapper(*bases, file, settings=settings, heard=lambda look: print(name, look, flush=True))
            file.with_suffix(".json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
        return file

    def adapter(self, base: str, name: str, seed: int) -> Adapter:
        """A LoRA on a base: one of the benchmark's recipes and seeds, or the demo's own, of which there is one."""
        if name == DEMO:
            return load_adapter(data_folder() / "loras" / f"style-{base}.safetensors")
        return load_adapter(self.shop.adapter(base, name, seed))

    def score(self, name: str, pictures: Pictures) -> dict[str, float]:
        """Shares of the pictures' pixels on the look's palette, and of pictures whose look and thing the judge sees."""
        look = "cyano" if name == DEMO else ADAPTERS[name].look
        assert look is not None
        concepts, looks = self.judge.named(pictures)
        return {
            "style": round(style_share(pictures, look), 4),
            "judge": round(float((looks == look_number(look)).mean()), 4),
            "concept": round(float((concepts == WANTED).mean()), 4),
        }


@dataclass(frozen=True)
class Case:
    """An adapter of v1, what is drawn, and the noise that its pictures begin from."""

    bench: Bench
    name: str
    seed: int
    prompts: tuple[str, ...] = PROMPTS

    def generators(self) -> list[torch.Generator]:
        first = 1_000 * (self.seed + 1)
        return [torch.Generator().manual_seed(first + i) for i in range(len(self.prompts))]

    def plain(self, which: str, adapter: Adapter | None, output: str = "np") -> Any:
        """Pictures of a base as its own pipeline draws them."""
        model = self.bench.old if which == OLD else self.bench.new
        with applied(model.components, adapter):
            made = model.pipeline(
                list(self.prompts),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=self.generators(),
                output_type=output,
            )
        return made.images

    def teacher(self) -> Pictures:
        return self.plain(OLD, self.bench.adapter(OLD, self.name, self.seed))

    def alone(self) -> Pictures:
        return self.plain(NEW, None)

    def native(self) -> Pictures:
        return self.plain(NEW, self.bench.adapter(NEW, self.name, self.seed))

    def delta(self, strength: Strength) -> Pictures:
        bridge = DeltaPipeline(self.bench.old, self.bench.new, self.bench.adapter(OLD, self.name, self.seed))
        return self.through(bridge, strength=strength)

    def x_adapter(self, mapper: Path, **settings: Any) -> Pictures:
        bridge = BridgePipeline(self.bench.old, self.bench.new, load_mapper(mapper))
        bridge.load_lora_weights(self.bench.adapter(OLD, self.name, self.seed))
        return self.through(bridge, **settings)

    def sdedit(self, start: float) -> Pictures:
        """The old base's picture with its adapter, drawn on by the new base from a share of the schedule."""
        with torch.no_grad():
            given = torch.from_numpy(self.teacher()).permute(0, 3, 1, 2) * 2 - 1
            space, pipeline = Latents(self.bench.new), self.bench.new.pipeline
            clean = space.encode(given)
            side = Prompted.of(self.bench.new, self.prompts, None, GUIDANCE, clean.shape[2:], STEPS)
            scheduler = pipeline.scheduler
            times = [time for time in scheduler.timesteps if float(time) <= start * space.steps]
            noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in self.generators()])
            z: Tensor = scheduler.add_noise(clean, noise, times[0].reshape(1))
            for time in times:
                z = scheduler.step(side.predict(z, float(time)), time, z).prev_sample
            pictures: Pictures = (space.decode(z) / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        return pictures

    def through(self, bridge: Callable[..., Any], **settings: Any) -> Pictures:
        pictures: Pictures = bridge(
            list(self.prompts),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=self.generators(),
            output_type="np",
            **settings,
        ).images
        return pictures


def timed(make: Callable[[], Pictures]) -> tuple[Pictures, float]:
    """Pictures, and the seconds that one took."""
    began = perf_counter()
    pictures = make()
    return pictures, (perf_counter() - began) / len(pictures)


def _quick(model: Loaded) -> Loaded:
    plain_attention(model.main)
    return model
