"""Look at what was made: a contact sheet, style shares, and a small judge that names the concept.

Works on prompts and seeds other than the report's, so that choices made here do not flatter it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from regraft.demo.style import style_share

from . import art, export
from .resume import batch_indices, cosine_rate

COLUMNS = [
    ("v1", None),
    ("v1", "style-v1"),
    ("v2", None),
    ("v2", "style-v1"),
    ("v2", "style-v2"),
    ("v2-retrained", None),
    ("v2-retrained", "style-v1"),
    ("v2-retrained", "style-v2-retrained"),
    ("v3", None),
    ("v3", "style-v3"),
]
"""Base and LoRA of each column; the v1 LoRA on another base is a copy of it."""

PROMPTS = [
    f"{concept} on {list(art.BACKGROUNDS)[(place + 3) % 6]}"
    for place, concept in enumerate([*art.CONCEPTS, *art.CONCEPTS])
]
SEEDS = [7000 + place for place in range(len(PROMPTS))]


def evaluate(data: Path, cache: Path, columns: list[tuple[str, str | None]] = COLUMNS) -> None:
    """Print one line per column, and write cache / sheet.png: rows = prompts, columns as above."""
    judge = trained_judge(cache)
    columns = [
        (b, a) for b, a in columns if (data / b).exists() and (not a or (data / f"loras/{a}.safetensors").exists())
    ]
    sheet = []
    print(f"{'base':14}{'LoRA':20}{'style':>7}{'concept':>9}")
    for base, adapter in columns:
        pictures = sample(data / base, data / f"loras/{adapter}.safetensors" if adapter else None, PROMPTS, SEEDS)
        with torch.no_grad():
            named = judge(_centred(torch.from_numpy(pictures).permute(0, 3, 1, 2).float())).argmax(1).numpy()
        right = (named == np.arange(len(PROMPTS)) % len(art.CONCEPTS)).mean()
        print(f"{base:14}{adapter or '-':20}{style_share(pictures).mean():7.3f}{right:9.2f}", flush=True)
        sheet.append(np.concatenate(pictures[: len(art.CONCEPTS)], axis=0))
    picture = Image.fromarray((np.concatenate(sheet, axis=1) * 255).round().astype(np.uint8))
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(cache / "sheet.png")


def sample(base: Path, adapter: Path | None, prompts: list[str], seeds: list[int]) -> np.ndarray:
    """Pictures (n, 32, 32, 3) in [0, 1], with one generator for each, so that a row shares its noise."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    if adapter:
        pipeline.load_lora_weights(adapter)
    return pipeline(
        prompts,
        num_inference_steps=export.STEPS,
        guidance_scale=export.GUIDANCE,
        height=art.SIZE,
        width=art.SIZE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images


def trained_judge(cache: Path) -> nn.Module:
    """A small convolutional classifier of the 16 concepts, trained on both art sets, plain and styled."""
    torch.manual_seed(5)
    judge = nn.Sequential(
        *_block(3, 24), *_block(24, 48), *_block(48, 64), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(256, len(art.CONCEPTS)),
    )  # fmt: skip
    kept = cache / "judge.pt"
    if kept.exists():
        judge.load_state_dict(torch.load(kept, weights_only=True))
        return judge.eval()
    sheets = [look(art.drawings(name, cache)) for name in art.ART for look in (art.plain, art.styled, art.styled)]
    pixels = np.concatenate([sheet.pixels for sheet in sheets])
    labels = torch.from_numpy(np.concatenate([sheet.prompts for sheet in sheets]) // len(art.BACKGROUNDS))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps := 900):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * cosine_rate(step, steps, warmup=30)
        chosen = batch_indices(5, step, 64, len(pixels))
        batch = _centred(torch.from_numpy(pixels[chosen]).float() / 255)
        # Noise, so that the judge goes by shape and not by a clean edge that samples do not have.
        loss = nn.functional.cross_entropy(judge(batch + 0.1 * torch.randn_like(batch)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(judge.state_dict(), kept)
    return judge.eval()


def _block(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]


def _centred(pixels: torch.Tensor) -> torch.Tensor:
    return pixels * 2 - 1
