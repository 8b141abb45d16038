"""Modules' original names lead where diffusers' own LoRA converters lead them, rows of fused weights included."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters

from regraft.families import ORIGINAL, Named, flattened, table

Convert = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

_WAN_BLOCKS = r"blocks\.\d+\.(self_attn|cross_attn|ffn)\."
_FLUX_BLOCKS = r"(double_blocks\.\d+\.(img|txt)_(attn|mlp|mod)|single_blocks\.\d+\.(linear|modulation))"
_HUNYUAN_BLOCKS = r"(double_blocks\.\d+\.(img|txt)_(attn|mlp)|single_blocks\.\d+\.linear)"
_PEFT, _KOHYA, _OLD = ("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")

# (table, converter, the original modules that trainers change, prefix, suffixes); a prefix with _ flattens the names
CONVERTERS: list[tuple[str, Convert, str, str, tuple[str, str]]] = [
    ("flux-dev", converters._convert_kohya_flux_lora_to_diffusers, _FLUX_BLOCKS, "lora_unet_", _KOHYA),
    (
        "flux2-klein-4b",
        converters._convert_non_diffusers_flux2_lora_to_diffusers,
        r"(double|single)_blocks\.",
        "diffusion_model.",
        _PEFT,
    ),
    (
        "z-image",
        converters._convert_non_diffusers_z_image_lora_to_diffusers,
        r"layers\.\d+\.attention\.",
        "diffusion_model.",
        _OLD,
    ),
    ("wan-1.3b", converters._convert_non_diffusers_wan_lora_to_diffusers, _WAN_BLOCKS, "diffusion_model.", _PEFT),
    ("wan-1.3b", converters._convert_musubi_wan_lora_to_diffusers, _WAN_BLOCKS, "lora_unet_", _KOHYA),
    ("wan-i2v-14b", converters._convert_non_diffusers_wan_lora_to_diffusers, _WAN_BLOCKS, "diffusion_model.", _PEFT),
    ("hunyuan-video", converters._convert_hunyuan_video_lora_to_diffusers, _HUNYUAN_BLOCKS, "diffusion_model.", _PEFT),
]


def modules(name: str, wanted: str) -> dict[str, Named]:
    """Linear modules of the original code that ``wanted`` picks."""
    named = table(name).named(ORIGINAL)
    return {
        path: entry
        for path, entry in named.items()
        if re.match(wanted, path) and f"{path}.weight" in named and len(entry.shape) == 2
    }


def tagged(number: int, entry: Named) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A (1, in), lora_B (out, 1)): rows of B say which module and which row they are."""
    down = torch.full((1, entry.shape[1]), float(number), dtype=torch.float64)
    return down, (number * 100_000 + torch.arange(entry.shape[0], dtype=torch.float64)).reshape(-1, 1)


@pytest.mark.parametrize(
    ("name", "convert", "wanted", "prefix", "suffixes"), CONVERTERS, ids=[f"{row[0]} {row[3]}" for row in CONVERTERS]
)
def test_pieces_are_the_rows_that_the_converter_gives_them(
    name: str, convert: Convert, wanted: str, prefix: str, suffixes: tuple[str, str]
) -> None:
    picked = modules(name, wanted)
    state = {}
    for number, (path, entry) in enumerate(picked.items()):
        key = prefix + (flattened(path) if prefix.endswith("_") else path)
        for suffix, value in zip(suffixes, tagged(number, entry), strict=True):
            state[f"{key}.{suffix}.weight"] = value
        if suffixes == _KOHYA:
            state[f"{key}.alpha"] = torch.tensor(1.0)
    converted = {key.removeprefix("transformer."): value for key, value in convert(state).items()}
    seen = 0
    for number, entry in enumerate(picked.values()):
        _, up = tagged(number, entry)
        for piece in entry.pieces:
            got = converted[f"{piece.name}.lora_B.weight"]
            rows = up if piece.rows is None else torch.cat([up[start:end] for start, end in piece.rows])
            assert torch.equal(got, rows)
            seen += 1
    assert seen == sum(key.endswith(".lora_B.weight") for key in converted)
