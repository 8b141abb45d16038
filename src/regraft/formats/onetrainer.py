"""OneTrainer's LEGACY files: kohya's grammar over diffusers names, for every model that it trains.

Facts (OneTrainer 23df3832; facts alone, it is AGPL):

- Prefixes ``lora_unet`` or ``lora_transformer``, ``lora_te1``, ``lora_te2``, ``lora_te3``; flattened diffusers names
  with split q, k, v; ``lora_down``, ``lora_up``, ``alpha``, ``dora_scale`` (per input column by default).
- Text encoders are wrapped whole, so ``lora_te2_text_projection`` occurs. Flux' T5 is ``lora_te2``.
- Placeholders of bundled embeddings: ``bundle_emb.<name>.clip_l`` and the like.
- Its other exports are of other formats: KOHYA (`kohya`), DIFFUSERS (`diffusers`), COMFY (`comfyui`), ORIGINAL
  (`original`), and in older releases OMI (`omi`). Metadata ``ot_branch`` and ``ot_revision`` tell them from others'.
"""

from __future__ import annotations

from dataclasses import replace

from regraft.adapter import Adapter
from regraft.families import CANONICAL
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._emit import Spelling, write
from regraft.formats.kohya import PREFIXES, is_flat, read_flat

_TRANSFORMER = tuple(prefix for prefix in PREFIXES if prefix.text == "lora_transformer_")
_UNET = tuple(prefix for prefix in PREFIXES if prefix.text in ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_"))
_SPELLING = Spelling(
    "onetrainer",
    _UNET + _TRANSFORMER,
    schemes=(CANONICAL,),
    kinds=frozenset({"lora", "dora", "loha"}),
)


def _detect(file: AdapterFile) -> bool:
    if any(key.startswith("lora_transformer_") for key in file.tensors):
        return True
    return is_flat(file) and any(key.startswith("ot_") for key in file.metadata)


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    return read_flat(file, names, "onetrainer")


def _write(adapter: Adapter) -> Written:
    spelling = _SPELLING
    if "transformer" in adapter.components() or adapter.layout.get("main") == "transformer":
        spelling = replace(spelling, prefixes=(*_TRANSFORMER, *_UNET))
    return write(adapter, spelling, {"modelspec.implementation": "https://github.com/huggingface/diffusers"})


FORMAT = Format("onetrainer", "OneTrainer (legacy: flattened diffusers names)", 68, _detect, _read, _write)
