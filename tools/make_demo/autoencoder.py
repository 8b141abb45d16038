"""Training of the demo's autoencoders, and the latents that the bases are trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from regraft.bench import diffusion_art as art
from regraft.bench.resume import Checkpoints, batch_indices, cosine_rate, step_generator

from . import models

PHASES = ((900, 48, 2e-3, torch.bfloat16), (2000, 16, 1.5e-3, torch.float32))
"""(steps, batch, peak rate, precision): large batches find the colours, many small ones the fine lines."""
STEPS = sum(steps for steps, *_ in PHASES)
SEEDS = {"ae": 11, "ae-v3": 12}
"""v1, v2 and v2-retrained share "ae"; v3 has its own, as new generations of base models do."""


def train(name: str, cache: Path) -> None:
    """Train autoencoder `name` on both art sets, plain and styled, and write it under cache / name."""
    if (cache / name / "config.json").exists():
        return
    torch.manual_seed(SEEDS[name])
    model = models.autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    pixels = _all_pictures(cache)
    checkpoints = Checkpoints(cache / f"{name}.checkpoint.pt", every=150, log=cache / f"{name}.log")
    for step in checkpoints.steps(STEPS, {"model": model, "optimizer": optimizer}):
        done, (steps, size, rate, precision) = (0, PHASES[0]) if step < PHASES[0][0] else (PHASES[0][0], PHASES[1])
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine_rate(step - done, steps, warmup=50)
        batch = _to_model(pixels[batch_indices(SEEDS[name], step, size, len(pixels))])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            posterior = model.encode(batch).latent_dist
            # A random draw keeps the latent space smooth; the KL weight is only there to bound it.
            decoded = model.decode(posterior.sample(step_generator(SEEDS[name], step))).sample.float()
        error = decoded - batch
        loss = error.abs().mean() + error.square().mean() + 1e-5 * posterior.kl().float().mean() / 100
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        checkpoints.note(step, loss=loss.item(), l1=error.abs().mean().item())
    _normalise(model, pixels)
    model.save_pretrained(cache / name)


@torch.no_grad()
def encode(name: str, pixels: np.ndarray, cache: Path) -> torch.Tensor:
    """Scaled latents of uint8 pictures (n, 3, 32, 32): float16 (n, 8, 16, 16)."""
    model = AutoencoderKL.from_pretrained(cache / name)
    chunks = [model.encode(_to_model(pixels[at : at + 256])).latent_dist.mode() for at in range(0, len(pixels), 256)]
    return (torch.cat(chunks) * model.config.scaling_factor).half()


def latents(name: str, data: str, cache: Path) -> dict[str, torch.Tensor]:
    """Latents and prompt indices of a data set ("noto", "noto-styled", …), computed once per autoencoder."""
    kept = cache / f"latents-{name}-{data}.pt"
    if not kept.exists():
        set_name, _, look = data.partition("-")
        pictures = (art.styled if look else art.plain)(art.drawings(set_name, cache))
        found = {"latents": encode(name, pictures.pixels, cache), "prompts": torch.from_numpy(pictures.prompts)}
        torch.save(found, kept)
    return torch.load(kept, weights_only=True)


def _all_pictures(cache: Path) -> np.ndarray:
    """Plain pictures of both sets once, and styled ones three times, so that half of a batch is neither rare."""
    sheets = []
    for name in art.ART:
        rgba = art.drawings(name, cache)
        sheets += [art.plain(rgba).pixels, *[art.styled(rgba).pixels] * 3]
    return np.concatenate(sheets)


def _to_model(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).float() / 127.5 - 1


@torch.no_grad()
def _normalise(model: AutoencoderKL, pixels: np.ndarray) -> None:
    """Give every latent channel mean 0 and one common spread, and set the scaling factor to 1 / spread.

    The Stable Diffusion pipeline knows one scaling factor and no shift, so uneven channels would stay
    uneven under its noise. Both 1 × 1 convolutions around the latent are affine per channel: folding
    the change into the one and its inverse into the other leaves every reconstruction as it was.
    """
    sample = pixels[batch_indices(0, 0, 4096, len(pixels))]
    codes = torch.cat([model.encode(_to_model(part)).latent_dist.mode() for part in np.array_split(sample, 16)])
    mean, spread = codes.mean(dim=(0, 2, 3)), codes.std(dim=(0, 2, 3))
    common = codes.sub(mean[:, None, None]).std()
    gain = common / spread
    count = len(gain)
    encoder, decoder = model.quant_conv, model.post_quant_conv
    encoder.bias[:count] = (encoder.bias[:count] - mean) * gain
    encoder.weight[:count] *= gain[:, None, None, None]
    encoder.bias[count:] += 2 * gain.log()  # the second half of the encoder's output is a log variance
    # x = y / gain + mean, put into W x + b
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight /= gain[None, :, None, None]
    model.register_to_config(scaling_factor=round(1 / common.item(), 5))
