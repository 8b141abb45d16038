"""Look at what was made: a contact sheet, style shares, and a small judge that names the concept.

Works on prompts and seeds other than the report's, so that choices made here do not flatter it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from regraft.bench import diffusion_art as art
from regraft.bench.diffusion_judge import trained_judge
from regraft.demo.style import style_share

from . import export

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
    judge = trained_judge(cache, cache / "judge.pt")
    columns = [
        (b, a) for b, a in columns if (data / b).exists() and (not a or (data / f"loras/{a}.safetensors").exists())
    ]
    sheet = []
    print(f"{'base':14}{'LoRA':20}{'style':>7}{'concept':>9}")
    for base, adapter in columns:
        pictures = sample(data / base, data / f"loras/{adapter}.safetensors" if adapter else None, PROMPTS, SEEDS)
        named, _ = judge.named(pictures)
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
