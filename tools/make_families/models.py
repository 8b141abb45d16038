"""The models that have a table: class, public configuration, names in the original code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers.loaders import single_file_utils as diffusers_converters
from tools.make_families import configs, rules
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
    return Model("diffusers", "FluxTransformer2DModel", {**configs.FLUX_DEV, **changes}, rules.FLUX, convert)


def _hunyuan(config: Mapping[str, Any]) -> Model:
    convert = diffusers_converters.convert_hunyuan_video_transformer_to_diffusers
    kind = "HunyuanVideoTransformer3DModel"
    return Model("diffusers", kind, config, rules.HUNYUAN, convert, {"comfy": rules.HUNYUAN_COMFY})


def _wan(config: Mapping[str, Any]) -> Model:
    convert = diffusers_converters.convert_wan_transformer_to_diffusers
    return Model("diffusers", "WanTransformer3DModel", config, rules.WAN, convert)


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
    "sd15-unet": _unet(configs.SD15_UNET),
    "sdxl-unet": _unet(configs.SDXL_UNET),
    "ssd1b-unet": _unet(configs.SSD1B_UNET),
    "clip-l": Model("transformers", "CLIPTextModel", configs.CLIP_L, level="text_model."),
    "clip-big-g": _open_clip(configs.CLIP_BIG_G, "CLIPTextModelWithProjection"),
    "t5-xxl": Model("transformers", "T5EncoderModel", configs.T5_XXL, tied=_TIED),
    "flux-dev": _flux(),
    "flux-schnell": _flux(guidance_embeds=False),
    "flux-fill": _flux(in_channels=384),
    "flux-control": _flux(in_channels=128),
    "hunyuan-video": _hunyuan(configs.HUNYUAN_VIDEO),
    "wan-14b": _wan(configs.WAN_14B),
    "wan-1.3b": _wan(configs.WAN_1_3B),
    "wan-i2v-14b": _wan(configs.WAN_I2V),
    "sd2-unet": _unet(configs.SD2_UNET),
    "clip-h": _open_clip(configs.CLIP_H, "CLIPTextModel"),
    "clip-l-projection": Model("transformers", "CLIPTextModelWithProjection", configs.CLIP_L),
    "clip-big-g-projection": Model("transformers", "CLIPTextModelWithProjection", configs.CLIP_BIG_G),
    "umt5-xxl": Model("transformers", "UMT5EncoderModel", configs.UMT5_XXL, rules.UMT5, tied=_TIED),
    "sd3-medium": _sd3(configs.SD3_MEDIUM),
    "sd35-medium": _sd3(configs.SD35_MEDIUM),
    "sd35-large": _sd3(configs.SD35_LARGE),
    "pixart-sigma": Model("diffusers", "PixArtTransformer2DModel", configs.PIXART_SIGMA, rules.PIXART),
    "flux2-dev": _flux2(configs.FLUX2_DEV),
    "flux2-klein-4b": _flux2(configs.FLUX2_KLEIN_4B),
    "flux2-klein-9b": _flux2(configs.FLUX2_KLEIN_9B),
    "chroma": Model(
        "diffusers",
        "ChromaTransformer2DModel",
        configs.CHROMA,
        rules.CHROMA,
        diffusers_converters.convert_chroma_transformer_checkpoint_to_diffusers,
    ),
    # The single file has the canonical names: diffusers' converter is the identity.
    "qwen-image": Model("diffusers", "QwenImageTransformer2DModel", configs.QWEN_IMAGE),
    "hunyuan-video-i2v": _hunyuan(configs.HUNYUAN_VIDEO_I2V),
    # FramePack's own code has diffusers' names.
    "framepack": Model("diffusers", "HunyuanVideoFramepackTransformer3DModel", configs.FRAMEPACK),
    "hunyuan-video-1.5": Model(
        "diffusers",
        "HunyuanVideo15Transformer3DModel",
        configs.HUNYUAN_VIDEO_15,
        rules.HUNYUAN_15,
        swapped=("norm_out.linear",),
    ),
    "wan22-i2v-14b": _wan(configs.WAN22_I2V),
    "wan22-5b": _wan(configs.WAN22_5B),
    "ltx-video-2b": _ltx(configs.LTX_2B),
    "ltx-video-13b": _ltx(configs.LTX_13B),
    "cogvideox-2b": _cogvideox(configs.COGVIDEOX_2B),
    "cogvideox-5b": _cogvideox(configs.COGVIDEOX_5B),
    "cogvideox-5b-i2v": _cogvideox(configs.COGVIDEOX_5B_I2V),
    "cogvideox-1.5-5b": _cogvideox(configs.COGVIDEOX_15_5B),
    "z-image": Model(
        "diffusers",
        "ZImageTransformer2DModel",
        configs.Z_IMAGE,
        rules.z_image,
        diffusers_converters.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
}
