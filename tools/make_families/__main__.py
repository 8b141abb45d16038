"""Writes the family files that list every module: ``python -m tools.make_families``.

The models are built on the meta device from the public configs below, so that nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from tools.make_families.sgm import sgm_names
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

FOLDER = Path(__file__).parents[2] / "src" / "regraft" / "families"

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
CLIP_BIG_G: dict[str, Any] = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def modules(model: torch.nn.Module) -> dict[str, list[int]]:
    """Path → shape of its weight, in the order of the state dict."""
    return {
        name.removesuffix(".weight"): list(value.shape)
        for name, value in model.state_dict().items()
        if name.endswith(".weight")
    }


def text_modules(config: dict[str, Any], *, projection: bool) -> dict[str, list[int]]:
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    found = modules(kind(CLIPTextConfig(**config)))
    # Files and older libraries say text_model.; transformers 5 leaves it out of CLIPTextModel.
    return {
        path if path.startswith(("text_model.", "text_proj")) else f"text_model.{path}": found[path] for path in found
    }


def unet(config: dict[str, Any]) -> dict[str, Any]:
    found = modules(UNet2DConditionModel(**config))
    return {"modules": found, "sgm": sgm_names(list(found), config["layers_per_block"])}


def write(name: str, content: dict[str, Any]) -> None:
    """JSON with one line per module, so that a change shows as what it is."""
    head = {key: value for key, value in content.items() if key != "components"}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    lines.append(' "components": {')
    components = []
    for component, tables in content["components"].items():
        parts = []
        for table, rows in tables.items():
            body = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items())
            parts.append(f"   {json.dumps(table)}: {{\n{body}\n   }}")
        components.append(f"  {json.dumps(component)}: {{\n" + ",\n".join(parts) + "\n  }")
    lines.append(",\n".join(components) + "\n }")
    (FOLDER / f"{name}.json").write_text("{\n" + "\n".join(lines) + "\n}\n", encoding="utf-8")


# The numbers of values that users of block weights give for each family; names are the original's block numbers.
SD15_BLOCKS = {
    "17": ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02}" for i in range(3, 12))],
    "26": ["BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))],
}
SDXL_BLOCKS = {
    "12": ["BASE", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02}" for i in range(6))],
    "20": ["BASE", *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9))],
}


def main() -> None:
    with torch.device("meta"):
        clip_l = text_modules(CLIP_L, projection=False)
        big_g = text_modules(CLIP_BIG_G, projection=True)
        sd15, sdxl = unet(SD15_UNET), unet(SDXL_UNET)
    write(
        "sd15",
        {
            "title": "Stable Diffusion 1.x",
            "priority": 10,
            "naming": "unet",
            "main": "unet",
            "varying": ["conv_in"],
            "original": {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768]},
            "prefixes": {"unet": "lora_unet", "text_encoder": "lora_te"},
            "kohya": "diffusers",
            "ss_base_model_version": "sd_v1",
            "blocks": SD15_BLOCKS,
            "components": {"unet": sd15, "text_encoder": {"modules": clip_l}},
        },
    )
    write(
        "sdxl",
        {
            "title": "Stable Diffusion XL",
            "priority": 11,
            "naming": "unet",
            "main": "unet",
            "varying": ["conv_in"],
            "original": {"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [640, 2048]},
            "prefixes": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
            "kohya": "sgm",
            "ss_base_model_version": "sdxl_base_v1-0",
            "blocks": SDXL_BLOCKS,
            "components": {"unet": sdxl, "text_encoder": {"modules": clip_l}, "text_encoder_2": {"modules": big_g}},
        },
    )


if __name__ == "__main__":
    main()
