"""The models that have a table: class, public configuration, names in the original code.

Configurations are those of the ``config.json`` files that the models are published with, written down here so that
nothing is downloaded; tests hold the tables to parameter counts and to lists made from the real files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers.loaders import single_file_utils as diffusers_converters
from tools.make_families import rules
from tools.make_families.sgm import sgm_names
from tools.make_families.trace import Converter, Rules


@dataclass(frozen=True)
class Model:
    """One table to make.

    Attributes:
        library: ``diffusers`` or ``transformers``.
        kind: class name there.
        config: arguments of the class (or of its config class, for transformers).
        rules: original names; None where the model has no other code than the canonical.
        convert: the real converter, original tensors to canonical ones.
        spellings: scheme → replacements in the original names.
        level: prefix that the library leaves out and files have.
        tied: parameter that is another one under a second name, which files may leave out → that one.
    """

    library: str
    kind: str
    config: Mapping[str, Any]
    rules: Rules | Callable[[list[str]], Rules] | None = None
    convert: Converter | None = None
    spellings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    level: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)


def _unet(config: Mapping[str, Any]) -> Model:
    prefix = "model.diffusion_model."

    def convert(tensors: dict[str, Any]) -> Mapping[str, Any]:
        named = {prefix + name: value for name, value in tensors.items()}
        return diffusers_converters.convert_ldm_unet_checkpoint(named, dict(config))

    def names(parameters: list[str]) -> Rules:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
        return {old: new for new, old in sgm_names(modules, config["layers_per_block"]).items()}

    return Model("diffusers", "UNet2DConditionModel", config, names, convert)


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
SSD1B_UNET: dict[str, Any] = {
    **SDXL_UNET,
    "transformer_layers_per_block": (1, (2, 2), (4, 4)),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
    "mid_block_type": "UNetMidBlock2D",
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
FLUX_DEV: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
HUNYUAN_VIDEO: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
}
WAN_14B: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "num_layers": 40,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "text_dim": 4096,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
WAN_1_3B: dict[str, Any] = {**WAN_14B, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
WAN_I2V: dict[str, Any] = {**WAN_14B, "in_channels": 36, "added_kv_proj_dim": 5120, "image_dim": 1280}
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}


def _open_clip(config: Mapping[str, Any], kind: str) -> Model:
    class Holder:
        pass

    def convert(tensors: dict[str, Any]) -> Mapping[str, Any]:
        holder = Holder()
        holder.config = type("Config", (), {"hidden_size": config["hidden_size"]})()  # type: ignore[attr-defined]
        return diffusers_converters.convert_open_clip_checkpoint(holder, tensors, prefix="")

    level = "" if kind.endswith("Projection") else "text_model."
    return Model("transformers", kind, config, rules.OPEN_CLIP, convert, level=level)


def _flux(**changes: Any) -> Model:
    convert = diffusers_converters.convert_flux_transformer_checkpoint_to_diffusers
    return Model("diffusers", "FluxTransformer2DModel", {**FLUX_DEV, **changes}, rules.FLUX, convert)


def _hunyuan(config: Mapping[str, Any]) -> Model:
    convert = diffusers_converters.convert_hunyuan_video_transformer_to_diffusers
    kind = "HunyuanVideoTransformer3DModel"
    return Model("diffusers", kind, config, rules.HUNYUAN, convert, {"comfy": rules.HUNYUAN_COMFY})


def _wan(config: Mapping[str, Any]) -> Model:
    convert = diffusers_converters.convert_wan_transformer_to_diffusers
    return Model("diffusers", "WanTransformer3DModel", config, rules.WAN, convert)


MODELS: dict[str, Model] = {
    "sd15-unet": _unet(SD15_UNET),
    "sdxl-unet": _unet(SDXL_UNET),
    "ssd1b-unet": _unet(SSD1B_UNET),
    "clip-l": Model("transformers", "CLIPTextModel", CLIP_L, level="text_model."),
    "clip-big-g": _open_clip(CLIP_BIG_G, "CLIPTextModelWithProjection"),
    "t5-xxl": Model("transformers", "T5EncoderModel", T5_XXL, tied={"encoder.embed_tokens.weight": "shared.weight"}),
    "flux-dev": _flux(),
    "flux-schnell": _flux(guidance_embeds=False),
    "flux-fill": _flux(in_channels=384),
    "flux-control": _flux(in_channels=128),
    "hunyuan-video": _hunyuan(HUNYUAN_VIDEO),
    "wan-14b": _wan(WAN_14B),
    "wan-1.3b": _wan(WAN_1_3B),
    "wan-i2v-14b": _wan(WAN_I2V),
}
