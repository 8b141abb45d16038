"""A ControlNet on silhouettes for a base, and how well pictures keep to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import mse_loss

from regraft.bench import diffusion_art as art
from regraft.bench import diffusion_models as models
from regraft.bench.diffusion_data import EMPTY, Schedule
from regraft.bench.diffusion_train import Workshop, mixed
from regraft.bench.resume import batch_indices, cosine_rate, step_generator
from regraft.runtime.libraries import library, quiet_libraries

STEPS, BATCH, RATE = 800, 32, 1e-3
#: The art that each base of the demo draws in.
ART = {"v1": "fluent", "v3": "noto"}


def silhouettes(rgba: art.Pixels) -> NDArray[np.uint8]:
    """What each drawing (concepts, variants, 32, 32, 4) covers: (concepts · variants, 32, 32, 3), black on white."""
    covered = rgba[..., 3].reshape(-1, art.SIZE, art.SIZE) > 127
    return np.where(covered, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=-1)


def trained(base: str, shop: Workshop, seed: int) -> Path:
    """A ControlNet's folder, trained on the base's own art unless it is there."""
    folder = shop.cache / "bridge" / f"controlnet-{base}-{seed}"
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(seed)
    place = shop.base(base)
    unet, (text, tokenizer) = models.open_unet(place), models.open_text(place)
    unet.requires_grad_(False)
    net = library("diffusers").ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
    models.plain_attention(net)
    schedule, data = Schedule.of(place / "scheduler"), shop.latents(base, ART[base])
    rgba = art.drawings(ART[base], shop.cache / "art")
    # The set keeps each drawing on one of the backgrounds: the same choice as `diffusion_data.Data` makes.
    variants = rgba.shape[1]
    places = np.arange(rgba.shape[0] * len(art.BACKGROUNDS) * variants)
    kept = places[(places // variants + places % variants) % 6 == 0]
    drawing = (kept // (len(art.BACKGROUNDS) * variants)) * variants + kept % variants
    shown = torch.from_numpy(silhouettes(rgba)[drawing]).permute(0, 3, 1, 2)
    assert len(shown) == len(data)
    with torch.no_grad():
        words = text(models.token_ids(tokenizer, [*art.PROMPTS, ""]))[0]
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine_rate(step, STEPS, warmup=20)
        random = step_generator(seed, step)
        chosen = batch_indices(seed, step, BATCH, len(data))
        clean, prompts = data.values[chosen].float(), data.prompts[chosen].clone()
        prompts[torch.rand(BATCH, generator=random) < 0.1] = EMPTY
        times = torch.randint(len(schedule.signal), (BATCH,), generator=random)
        noise = torch.randn(clean.shape, generator=random)
        states, aims = schedule.noised(clean, noise, times)
        with mixed():
            given = {"encoder_hidden_states": words[prompts]}
            down, mid = net(states, times, controlnet_cond=shown[chosen].float() / 255, return_dict=False, **given)
            found = unet(
                states, times, **given, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample
        loss = mse_loss(found.float(), aims)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 100 == 99:
            print("controlnet", base, step + 1, round(float(loss.detach()), 4), flush=True)
    with quiet_libraries():
        net.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Conditions:
    """Silhouettes of drawings that nothing was trained on, one for each prompt.

    Attributes:
        images: (n, 32, 32, 3), black on white.
        covered: (n, 32, 32), true where the thing is.
    """

    images: NDArray[np.uint8]
    covered: NDArray[np.bool_]

    @classmethod
    def of(cls, shop: Workshop, concepts: NDArray[np.int64], seed: int) -> Conditions:
        """Of the old base's art, a drawing for each concept's number."""
        rgba = art.drawings(ART["v1"], shop.cache / "art", test=True)
        which = (np.arange(len(concepts)) + 3 * seed) % rgba.shape[1]
        chosen = rgba[concepts, which]
        return cls(silhouettes(chosen[None]), chosen[..., 3] > 127)

    def pictures(self) -> list[Any]:
        return [library("PIL.Image").fromarray(image) for image in self.images]

    def agreement(self, pictures: art.Floats) -> float:
        """Mean intersection over union of what is asked for and what is drawn.

        The ground is the median colour of a picture's border; what is further from it than an eighth is the thing.
        """
        border = np.concatenate([pictures[:, 0], pictures[:, -1], pictures[:, :, 0], pictures[:, :, -1]], axis=1)
        ground = np.median(border, axis=1)[:, None, None]
        drawn = np.linalg.norm(pictures - ground, axis=-1) > 0.125
        both = (drawn & self.covered).sum((1, 2))
        either = (drawn | self.covered).sum((1, 2)).clip(1)
        return float((both / either).mean())
