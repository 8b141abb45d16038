"""Names and shapes of ΔW in golden lists, cut out of the keys: what a format's reader hands to `recognise`."""

from __future__ import annotations

import re
from typing import Any

from truth import GOLDEN, read

from regraft.tensors import Shape

# Longest first; the part before is a module's name, or a whole parameter's where the suffix says so.
_SUFFIXES = sorted(
    re.split(
        r"\s+",
        """
    lora_down.weight lora_up.weight lora_mid.weight alpha dora_scale lora_A.weight lora_B.weight lora_B.bias
    lora.down.weight lora.up.weight lora_linear_layer.down.weight lora_linear_layer.up.weight down.weight up.weight
    diff diff_b w_norm b_norm lora_magnitude_vector lora_magnitude_vector.weight lora_embedding_A lora_embedding_B
    hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 lokr_w1 lokr_w2 lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b
    lokr_t2 oft_blocks rescale a1.weight a2.weight b1.weight b2.weight bm.weight base_layer.weight base_layer.bias
    weight bias scale
    """.strip(),
    ),
    key=len,
    reverse=True,
)
_WHOLE = ("weight", "bias", "scale")
_PREFIXES = {
    "base_model.model.": "",
    "diffusion_model.": "unet",
    "unet.": "unet",
    "lora_unet_": "unet",
    "transformer.": "transformer",
    "lora_transformer_": "transformer",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_DOWN = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight", "down.weight")
_UP = ("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight", "up.weight")


def names_of(golden: str) -> tuple[dict[str, dict[str, Shape | None]], dict[str, str]]:
    """(component → name → shape of ΔW, metadata) of a golden list."""
    data = read(GOLDEN, golden)
    parts: dict[tuple[str, str], dict[str, list[int]]] = {}
    for key, about in data["tensors"].items():
        suffix = next(suffix for suffix in _SUFFIXES if key.endswith(f".{suffix}"))
        prefix = max((p for p in _PREFIXES if key.startswith(p)), key=len, default="")
        name = _plain(key.removeprefix(prefix).removesuffix(f".{suffix}"))
        if suffix in _WHOLE:
            name = f"{name}.{suffix}"
        parts.setdefault((_PREFIXES.get(prefix, ""), name), {})[suffix] = about["shape"]
    found: dict[str, dict[str, Shape | None]] = {}
    for (component, name), tensors in parts.items():
        found.setdefault(component, {})[name] = _shape(tensors)
    metadata: dict[str, Any] = data["metadata"]
    return found, {key: str(value) for key, value in metadata.items()}


def _shape(tensors: dict[str, list[int]]) -> Shape | None:
    up = next((tensors[s] for s in _UP if s in tensors), None)
    down = next((tensors[s] for s in _DOWN if s in tensors), None)
    if up is None or down is None:
        whole = next((tensors[suffix] for suffix in (*_WHOLE, "diff") if suffix in tensors), None)
        return tuple(whole) if whole is not None else None
    kernel = tensors.get("lora_mid.weight", down)[2:]
    return (up[0], down[1], *kernel)


def _plain(name: str) -> str:
    """The module that an attention processor of old diffusers, or of XLabs, changes."""
    found = re.fullmatch(r"(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)", name)
    if found and found[1] == "double":
        # lora1 is the image stream's, lora2 the text stream's.
        return f"double_blocks.{found[2]}.{'img' if found[4] == '1' else 'txt'}_attn.{found[3]}"
    if found:
        return f"single_blocks.{found[2]}.{'linear1' if found[3] == 'qkv' else 'linear2'}"
    name = re.sub(r"\.processor\.(to_[qkv]|to_out)_lora$", r".\1", name)
    name = re.sub(r"self_attn\.to_([qkv]|out)_lora$", r"self_attn.\1_proj", name)
    return f"{name}.0" if name.endswith(".to_out") else name
