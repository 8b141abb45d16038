"""Text encoders in whole checkpoints: where they lie, and open_clip's names.

Prefixes by ldm (SD 1.x, 2.x), sgm (SDXL) and ComfyUI (``text_encoders.…``, saved by its CheckpointSave node).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from regraft.checkpoints._views import RowRanges
from regraft.tensors import TensorRef, Transposed

# Prefix → component. The SDXL refiner has only the second encoder, at the first one's place.
_FIXED = {
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "conditioner.embedders.0.model.": "text_encoder_2",
}
# ComfyUI's names of encoders, in the order in which diffusers' pipelines number those that they have.
_NUMBERED = ("llama", "qwen25_7b", "qwen3_4b", "mistral3_24b", "gemma2_2b", "clip_l", "clip_g", "t5xxl", "umt5xxl")
_INNER = ("transformer.model.", "transformer.", "")
_IN_PROJ = "attn.in_proj_"
# open_clip's names within a block, and outside of one → transformers'.
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_WHOLE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


@dataclass(frozen=True)
class Encoder:
    """A text encoder within a file: transformers' name → view, and the stored names behind these."""

    tensors: Mapping[str, TensorRef]
    used: frozenset[str]


def find_encoders(tensors: Mapping[str, TensorRef], roots: Mapping[str, tuple[str, ...]]) -> dict[str, Encoder]:
    """Component → its text encoder.

    Args:
        tensors: stored name → tensor.
        roots: component → prefixes under which its family keeps it; they settle which encoder is the second.
    """
    found: dict[str, Encoder] = {}
    known = [(prefix, component) for component, prefixes in roots.items() for prefix in prefixes if prefix]
    for prefix, component in (*known, *_FIXED.items()):
        part = _under(tensors, prefix)
        if part and component not in found:
            # SD 2.x reads the layer before the last: diffusers' encoder has no last one, and no projection.
            found[component] = _encoder(part, prefix, cut_last=prefix == "cond_stage_model.model.")
    held = {name.split(".")[1] for name in tensors if name.startswith("text_encoders.") and name.count(".") > 1}
    order = [name for name in _NUMBERED if name in held]
    for place, name in enumerate(order):
        component = "text_encoder" if place == 0 else f"text_encoder_{place + 1}"
        if component in found or any(prefix.startswith(f"text_encoders.{name}.") for prefix, _ in known):
            continue
        for inner in _INNER:
            prefix = f"text_encoders.{name}.{inner}"
            part = _under(tensors, prefix)
            if part:
                found[component] = _encoder(part, prefix, cut_last=False)
                break
    return found


def _under(tensors: Mapping[str, TensorRef], prefix: str) -> dict[str, TensorRef]:
    return {name[len(prefix) :]: ref for name, ref in tensors.items() if name.startswith(prefix)}


def _encoder(part: Mapping[str, TensorRef], prefix: str, *, cut_last: bool) -> Encoder:
    if any(name.startswith("transformer.resblocks.") for name in part):
        shown, used = open_clip(part, cut_last=cut_last)
    else:
        # Position numbers and logit scales are no parameters of transformers' text models.
        shown = {n: ref for n, ref in part.items() if not n.endswith("position_ids") and n != "logit_scale"}
        used = set(shown)
    return Encoder(shown, frozenset(f"{prefix}{name}" for name in used))


def open_clip(part: Mapping[str, TensorRef], *, cut_last: bool) -> tuple[dict[str, TensorRef], set[str]]:
    """An open_clip text model by transformers' names; query, key and value are one matrix there, cut in three.

    Args:
        part: open_clip's name → tensor.
        cut_last: leave out the last block and the projection.

    Returns:
        transformers' name → view, and the names used.
    """
    blocks = [int(found[1]) for name in part if (found := re.match(r"transformer\.resblocks\.(\d+)\.", name))]
    shown: dict[str, TensorRef] = {}
    used = set()
    for name, ref in part.items():
        views = _views(name, ref, last=max(blocks) if cut_last else None)
        if views:
            used.add(name)
            shown.update(views)
    return shown, used


def _views(name: str, ref: TensorRef, last: int | None) -> dict[str, TensorRef]:
    if name in _WHOLE:
        return {_WHOLE[name]: ref}
    if name == "text_projection" and last is None:
        return {"text_projection.weight": Transposed(ref)}
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if found is None or int(found[1]) == last:
        return {}
    layer, inner = f"text_model.encoder.layers.{found[1]}", found[2]
    if inner.startswith(_IN_PROJ) and ref.shape and ref.shape[0] % 3 == 0:
        kind, rows = inner.removeprefix(_IN_PROJ), ref.shape[0] // 3
        return {
            f"{layer}.self_attn.{role}_proj.{kind}": RowRanges(ref, ((i * rows, (i + 1) * rows),))
            for i, role in enumerate("qkv")
        }
    module, _, kind = inner.rpartition(".")
    return {f"{layer}.{_BLOCK[module]}.{kind}": ref} if module in _BLOCK else {}
