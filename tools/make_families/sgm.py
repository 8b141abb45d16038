"""Names of a U-Net's modules in the original (ldm / sgm) code, from the diffusers names and the block layout.

The original numbers its blocks through: ``input_blocks`` holds the first convolution, then every layer and
downsampler of the down path; ``output_blocks`` every layer of the up path, upsamplers inside the last of a stage.
"""

from __future__ import annotations

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def sgm_names(paths: list[str], layers_per_block: int) -> dict[str, str]:
    """diffusers path → original path, for every path of a U-Net."""
    return {path: _sgm_name(path, paths, layers_per_block) for path in paths}


def _sgm_name(path: str, paths: list[str], layers: int) -> str:
    if path in OUTER:
        return OUTER[path]
    parts = path.split(".")
    if parts[0] == "mid_block":
        # resnet, attention, resnet
        position = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        return f"middle_block.{position}.{_inner(parts[1], parts[3:])}"
    stage, kind, index = int(parts[1]), parts[2], int(parts[3])
    if parts[0] == "down_blocks":
        first = 1 + stage * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op"
        return f"input_blocks.{first + index}.{int(kind == 'attentions')}.{_inner(kind, parts[4:])}"
    first = stage * (layers + 1)
    if kind == "upsamplers":
        # After the resnet, and after the attention where the stage has one.
        attends = any(other.startswith(f"up_blocks.{stage}.attentions.") for other in paths)
        return f"output_blocks.{first + layers}.{1 + attends}.conv"
    return f"output_blocks.{first + index}.{int(kind == 'attentions')}.{_inner(kind, parts[4:])}"


def _inner(kind: str, rest: list[str]) -> str:
    return RESNET[rest[0]] if kind == "resnets" else ".".join(rest)
