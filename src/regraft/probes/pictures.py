"""Pictures of text-to-image pipelines: the same prompts from the same starting noise, one column per adapter."""

from __future__ import annotations

import base64
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import torch

from regraft.adapter import Adapter
from regraft.errors import RegraftError, first_line
from regraft.report.schema import Picture
from regraft.runtime.applied import applied, fitting
from regraft.runtime.libraries import quiet_libraries
from regraft.runtime.load import Loaded

STEPS, LARGEST = 20, 512

#: (pictures, height, width, channels), from 0 to 1.
Images = np.ndarray[Any, np.dtype[np.float32]]

# What pipelines of sound and video are asked for, beyond a prompt.
_NO_PICTURES = ("num_frames", "audio_length_in_s", "audio_end_in_s")


def makes_pictures(model: Loaded) -> bool:
    """Whether ``model`` is a pipeline from prompts to pictures."""
    if model.pipeline is None or model.main_name == "prior":
        return False
    accepted = inspect.signature(model.pipeline.__call__).parameters
    return {"prompt", "generator", "output_type"} <= accepted.keys() and not any(n in accepted for n in _NO_PICTURES)


def draw(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, **settings: Any) -> Images:
    """One picture per prompt, all in one batch, each from the noise of its own seed.

    Args:
        pipeline: a diffusers pipeline.
        prompts: what to draw.
        seeds: one per prompt.
        steps: of the sampler.
        settings: further arguments of the pipeline; its defaults hold for the rest.
    """
    # On the CPU, so that one seed is one noise on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    made = pipeline(prompt=list(prompts), num_inference_steps=steps, generator=generators, output_type="np", **settings)
    images: Images = made.images
    return images


def png(image: Images) -> str:
    """A picture (height, width, channels) as a PNG in base64."""
    from matplotlib.image import imsave

    if image.shape[-1] == 1:
        image = image.repeat(3, axis=-1)
    # Eight bits by rounding, as pictures are saved elsewhere; matplotlib's own scaling would cut instead.
    buffer = BytesIO()
    imsave(buffer, (image * 255).round().astype(np.uint8), format="png")
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass
class ContactSheet:
    """Columns of pictures, drawn one by one while their model is loaded.

    Attributes:
        prompts: one row each.
        seed: of the first row's noise; the next row has the next seed.
        tick: told of each picture.
        largest: side in pixels that pictures are made smaller to, for the record; None leaves them as they are.
        columns: what was drawn.
    """

    prompts: Sequence[str]
    seed: int
    tick: Callable[[str], None]
    largest: int | None = None
    columns: list[Picture] = field(default_factory=list)
    _noise: tuple[Any, ...] = ()

    def draw_old(self, model: Loaded, original: Adapter) -> None:
        """The old base without and with its adapter."""
        if not self.prompts or not makes_pictures(model):
            return
        self._noise = _noise(model)
        self.add("Old base", "old base", model, None, f"{STEPS} steps, noise of seed {self.seed} and on")
        self.add("Old base", "old + original", model, original)

    def draw_new(self, model: Loaded, original: Adapter, ported: Adapter) -> None:
        """The new base without an adapter, with a plain copy where it fits, and with the ported one."""
        if not self.columns or not makes_pictures(model):
            self.columns.clear()
            return
        same = "the same steps and noise" if _noise(model) == self._noise else "other noise: other latents"
        self.add("New base", "new base", model, None, same)
        copied, copy = fitting(model.components, original), None
        lost, total = len(original.updates) - len(copied.updates), len(original.updates)
        if copied.updates:
            note = f"{lost} of {total} modules have no place" if lost else "the original as it is"
            copy = self.add("New base", "new + copied", model, copied, note)
        column = self.add("New base", "new + ported", model, ported)
        if copy is not None and copy.png == column.png:
            column.note = "the same pictures as the copy’s"

    def add(self, group: str, title: str, model: Loaded, adapter: Adapter | None, note: str = "") -> Picture:
        """One more column: the prompts as ``model`` draws them with ``adapter``."""
        pictures = []
        with applied(model.components, adapter), quiet_libraries():
            for i, prompt in enumerate(self.prompts):
                pictures.append(_picture(model, prompt, self.seed + i, self.largest))
                self.tick(f"pictures of {title}")
        if "" in pictures:
            note = "; ".join(part for part in (note, "NaN or Inf in place of a picture") if part)
        self.columns.append(Picture(title=title, group=group, png=pictures, note=note))
        return self.columns[-1]


def _picture(model: Loaded, prompt: str, seed: int, largest: int | None = None) -> str:
    """A PNG in base64; nothing where the decoder gave NaN, as some do in half precision."""
    try:
        image = draw(model.pipeline, [prompt], [seed], steps=STEPS, **_size(model))[0]
    except Exception as error:
        raise RegraftError(
            f"{model.name} can't draw a picture ({first_line(error)})",
            file=model.path,
            remedy="Pass --pictures 0 to do without.",
        ) from error
    return png(_smaller(image, largest)) if bool(np.isfinite(image).all()) else ""


def _smaller(image: Images, largest: int | None) -> Images:
    """A picture (height, width, channels) with its longer side cut to ``largest``, by areas."""
    height, width = image.shape[:2]
    if largest is None or max(height, width) <= largest:
        return image
    size = tuple(max(1, round(side * largest / max(height, width))) for side in (height, width))
    small = torch.nn.functional.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].float(), size, mode="area")
    found: Images = small[0].permute(1, 2, 0).numpy()
    return found


def _size(model: Loaded) -> dict[str, int]:
    """The size that the pipeline draws by default, each side cut to `LARGEST`; nothing where it can't be told."""
    sample = getattr(model.main.config, "sample_size", None) or getattr(model.pipeline, "default_sample_size", None)
    factor = getattr(model.pipeline, "vae_scale_factor", None)
    accepted = inspect.signature(model.pipeline.__call__).parameters
    if sample is None or factor is None or not {"height", "width"} <= accepted.keys():
        return {}
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return {"height": min(height * factor, LARGEST), "width": min(width * factor, LARGEST)}


def _noise(model: Loaded) -> tuple[Any, ...]:
    """What the shape of the starting noise comes from: equal for two models, and one seed gives them one noise."""
    channels = getattr(model.main.config, "in_channels", None)
    return channels, getattr(model.pipeline, "vae_scale_factor", None), _size(model)
