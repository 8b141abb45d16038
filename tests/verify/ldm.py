"""A diffusers Stable Diffusion folder as one file with the names of the original code base (LDM)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = (
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    (".resnets.", ".block."),
    ("down_blocks.", "down."),
)


def _unet(name: str, layers: int, attends: set[int]) -> str:
    for ours, theirs in _ENDS.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    side, block, kind, item, rest = re.fullmatch(
        r"(down_blocks\.|up_blocks\.|mid_block)(\d*)\.(\w+)\.(\d+)\.(.+)", name
    ).groups()  # type: ignore[union-attr]
    i, j = int(block or 0), int(item)
    head, _, tail = rest.partition(".")
    if kind == "resnets":
        rest = f"{_RESNET[head]}.{tail}"
    if side == "mid_block":
        return f"middle_block.{2 * j if kind == 'resnets' else 1}.{rest}"
    if side == "down_blocks.":
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (i + 1)}.0.op.{tail}"
        return f"input_blocks.{(layers + 1) * i + j + 1}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * (i + 1) - 1}.{2 if i in attends else 1}.{rest}"
    return f"output_blocks.{(layers + 1) * i + j}.{int(kind == 'attentions')}.{rest}"


def _vae(name: str, blocks: int) -> str:
    for ours, theirs in _VAE:
        name = name.replace(ours, theirs)
    return re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}", name)


def write_single_file(pipeline: Any, file: Path) -> Path:
    """All components of the pipeline in one safetensors file."""
    config = pipeline.unet.config
    attends = {i for i, kind in enumerate(config.up_block_types) if "CrossAttn" in kind}
    out: dict[str, Tensor] = {}
    for name, value in pipeline.unet.state_dict().items():
        out["model.diffusion_model." + _unet(name, config.layers_per_block, attends)] = value
    for name, value in pipeline.vae.state_dict().items():
        theirs = _vae(name, len(pipeline.vae.config.block_out_channels))
        square = ".mid.attn_1." in theirs and ".norm." not in theirs and theirs.endswith("weight")
        out["first_stage_model." + theirs] = value[:, :, None, None] if square else value
    for name, value in pipeline.text_encoder.state_dict().items():
        out["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = value
    save_file({name: value.clone().contiguous() for name, value in out.items()}, file)
    return file
