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
        convert: the real converter, original tensors to canonical ones; None where diffusers ships none, so that the
            rules are read off its scripts alone.
        spellings: scheme → replacements in the original names.
        level: prefix that the library leaves out and files have.
        tied: parameter that is another one under a second name, which files may leave out → that one.
        chunks: end of a module's name → which equal chunks of a fused weight it is, where they are not in order.
        swapped: modules of which the original has the halves the other way round.
    """

    library: str
    kind: str
    config: Mapping[str, Any]
    rules: Rules | Callable[[list[str]], Rules] | None = None
    convert: Converter | None = None
    spellings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    level: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    chunks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()


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


SD2_UNET: dict[str, Any] = {
    **SD15_UNET,
    "sample_size": 96,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
CLIP_H: dict[str, Any] = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    # The last of its 24 layers is never used: Stable Diffusion 2 reads the one before.
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
UMT5_XXL: dict[str, Any] = {**T5_XXL, "vocab_size": 256384}
SD3_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM: dict[str, Any] = {
    **SD3_MEDIUM,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
SD35_LARGE: dict[str, Any] = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
PIXART_SIGMA: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "patch_size": 2,
    "caption_channels": 4096,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
FLUX2_DEV: dict[str, Any] = {
    "in_channels": 128,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "mlp_ratio": 3.0,
}
FLUX2_KLEIN_4B: dict[str, Any] = {
    **FLUX2_DEV,
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
FLUX2_KLEIN_9B: dict[str, Any] = {
    **FLUX2_DEV,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
CHROMA: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 5120,
    "approximator_layers": 5,
}
QWEN_IMAGE: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
}
# Concatenated to the noisy latents: the image's latents and a mask.
HUNYUAN_VIDEO_I2V: dict[str, Any] = {
    **HUNYUAN_VIDEO,
    "in_channels": 33,
    "guidance_embeds": False,
    "image_condition_type": "latent_concat",
}
FRAMEPACK: dict[str, Any] = {
    **HUNYUAN_VIDEO,
    "has_image_proj": True,
    "image_proj_dim": 1152,
    "has_clean_x_embedder": True,
}
HUNYUAN_VIDEO_15: dict[str, Any] = {
    "in_channels": 65,
    "out_channels": 32,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 54,
    "num_refiner_layers": 2,
    "text_embed_dim": 3584,
    "text_embed_2_dim": 1472,
    "image_embed_dim": 1152,
}
WAN22_I2V: dict[str, Any] = {**WAN_14B, "in_channels": 36}
WAN22_5B: dict[str, Any] = {
    **WAN_14B,
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
}
LTX_2B: dict[str, Any] = {
    "in_channels": 128,
    "out_channels": 128,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "num_layers": 28,
    "caption_channels": 4096,
}
LTX_13B: dict[str, Any] = {**LTX_2B, "attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}
COGVIDEOX_2B: dict[str, Any] = {
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 30,
    "text_embed_dim": 4096,
}
COGVIDEOX_5B: dict[str, Any] = {
    **COGVIDEOX_2B,
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
COGVIDEOX_5B_I2V: dict[str, Any] = {
    **COGVIDEOX_5B,
    "in_channels": 32,
    "use_learned_positional_embeddings": True,
}
COGVIDEOX_15_5B: dict[str, Any] = {
    **COGVIDEOX_5B,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
}
Z_IMAGE: dict[str, Any] = {"in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30}


def _sd3(config: Mapping[str, Any]) -> Model:
    convert = diffusers_converters.convert_sd3_transformer_checkpoint_to_diffusers
    return Model("diffusers", "SD3Transformer2DModel", config, rules.SD3, convert)


def _flux2(config: Mapping[str, Any]) -> Model:
    convert = diffusers_converters.convert_flux2_transformer_checkpoint_to_diffusers
    return Model("diffusers", "Flux2Transformer2DModel", config, rules.FLUX2, convert)


def _ltx(config: Mapping[str, Any]) -> Model:
    convert = diffusers_converters.convert_ltx_transformer_checkpoint_to_diffusers
    return Model("diffusers", "LTXVideoTransformer3DModel", config, rules.ltx, convert)


def _cogvideox(config: Mapping[str, Any]) -> Model:
    kind = "CogVideoXTransformer3DModel"
    return Model("diffusers", kind, config, rules.COGVIDEOX, chunks=rules.COGVIDEOX_CHUNKS)


_TIED = {"encoder.embed_tokens.weight": "shared.weight"}

MODELS: dict[str, Model] = {
    "sd15-unet": _unet(SD15_UNET),
    "sdxl-unet": _unet(SDXL_UNET),
    "ssd1b-unet": _unet(SSD1B_UNET),
    "clip-l": Model("transformers", "CLIPTextModel", CLIP_L, level="text_model."),
    "clip-big-g": _open_clip(CLIP_BIG_G, "CLIPTextModelWithProjection"),
    "t5-xxl": Model("transformers", "T5EncoderModel", T5_XXL, tied=_TIED),
    "flux-dev": _flux(),
    "flux-schnell": _flux(guidance_embeds=False),
    "flux-fill": _flux(in_channels=384),
    "flux-control": _flux(in_channels=128),
    "hunyuan-video": _hunyuan(HUNYUAN_VIDEO),
    "wan-14b": _wan(WAN_14B),
    "wan-1.3b": _wan(WAN_1_3B),
    "wan-i2v-14b": _wan(WAN_I2V),
    "sd2-unet": _unet(SD2_UNET),
    "clip-h": _open_clip(CLIP_H, "CLIPTextModel"),
    "clip-l-projection": Model("transformers", "CLIPTextModelWithProjection", CLIP_L),
    "clip-big-g-projection": Model("transformers", "CLIPTextModelWithProjection", CLIP_BIG_G),
    "umt5-xxl": Model("transformers", "UMT5EncoderModel", UMT5_XXL, rules.UMT5, tied=_TIED),
    "sd3-medium": _sd3(SD3_MEDIUM),
    "sd35-medium": _sd3(SD35_MEDIUM),
    "sd35-large": _sd3(SD35_LARGE),
    "pixart-sigma": Model("diffusers", "PixArtTransformer2DModel", PIXART_SIGMA, rules.PIXART),
    "flux2-dev": _flux2(FLUX2_DEV),
    "flux2-klein-4b": _flux2(FLUX2_KLEIN_4B),
    "flux2-klein-9b": _flux2(FLUX2_KLEIN_9B),
    "chroma": Model(
        "diffusers",
        "ChromaTransformer2DModel",
        CHROMA,
        rules.CHROMA,
        diffusers_converters.convert_chroma_transformer_checkpoint_to_diffusers,
    ),
    # The single file has the canonical names: diffusers' converter is the identity.
    "qwen-image": Model("diffusers", "QwenImageTransformer2DModel", QWEN_IMAGE),
    "hunyuan-video-i2v": _hunyuan(HUNYUAN_VIDEO_I2V),
    # FramePack's own code has diffusers' names.
    "framepack": Model("diffusers", "HunyuanVideoFramepackTransformer3DModel", FRAMEPACK),
    "hunyuan-video-1.5": Model(
        "diffusers",
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN_VIDEO_15,
        rules.HUNYUAN_15,
        swapped=("norm_out.linear",),
    ),
    "wan22-i2v-14b": _wan(WAN22_I2V),
    "wan22-5b": _wan(WAN22_5B),
    "ltx-video-2b": _ltx(LTX_2B),
    "ltx-video-13b": _ltx(LTX_13B),
    "cogvideox-2b": _cogvideox(COGVIDEOX_2B),
    "cogvideox-5b": _cogvideox(COGVIDEOX_5B),
    "cogvideox-5b-i2v": _cogvideox(COGVIDEOX_5B_I2V),
    "cogvideox-1.5-5b": _cogvideox(COGVIDEOX_15_5B),
    "z-image": Model(
        "diffusers",
        "ZImageTransformer2DModel",
        Z_IMAGE,
        rules.z_image,
        diffusers_converters.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
}
