"""A pair of diffusers folders with SD 1.5's true names, shapes and configs, and weights made from a seed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tools.make_families.configs import CLIP_L, SD15_UNET
from transformers import CLIPTextConfig, CLIPTextModel

DRIFT = 0.1


def make_pair(folder: Path, *, drift: float = DRIFT) -> tuple[Path, Path]:
    """Write ``old`` and ``new`` (float16, 2 GB each); ``new`` is ``old`` moved by ``drift`` of each matrix's norm."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SD15_UNET)
        text = CLIPTextModel(CLIPTextConfig(**CLIP_L))
    parts = {
        "unet": ("diffusion_pytorch_model.safetensors", unet, dict(unet.config)),
        "text_encoder": ("model.safetensors", text, text.config.to_dict()),
    }
    old, new = folder / "old", folder / "new"
    for component, (name, model, config) in parts.items():
        generator = torch.Generator().manual_seed(0)
        before, after = {}, {}
        for key, shape in model.state_dict().items():
            weight = torch.randn(shape.shape, generator=generator) * 0.02
            before[key] = weight.half()
            after[key] = (weight + drift * 0.02 * torch.randn(shape.shape, generator=generator)).half()
        for base, state in ((old, before), (new, after)):
            (base / component).mkdir(parents=True, exist_ok=True)
            save_file(state, base / component / name, metadata={"format": "pt"})
            (base / component / "config.json").write_text(json.dumps(config, default=str))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    for base in (old, new):
        (base / "model_index.json").write_text(json.dumps(index))
    return old, new
