"""The names of a model's own code without any prefix: BFL's Flux control LoRA, OneTrainer's ORIGINAL.

Facts (black-forest-labs' Canny and Depth LoRA; OneTrainer 23df3832):

- Key: the module's original name + ``.lora_A.weight`` / ``.lora_B.weight``. BFL adds ``.lora_B.bias``, and the norms of
  query and key as their new values (``….query_norm.scale``): set, not added. ``img_in`` has 128 inputs there.
- Scale 1, or alpha / rank where ``.alpha`` stands beside the pair (OneTrainer, with ``.dora_scale``).
"""

from __future__ import annotations

from regraft.adapter import Adapter
from regraft.families import CANONICAL, ORIGINAL
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._emit import Spelling, write
from regraft.formats._grammar import MAIN, Prefix, read
from regraft.formats._naming import recognise_scheme
from regraft.formats._suffixes import split_key

_COMPONENTS = ("unet.", "transformer.", "transformer_2.", "text_encoder", "controlnet.", "prior.", "base_model.model.")
PREFIXES = (Prefix("", MAIN, flat=False),)
_SPELLING = Spelling(
    "original",
    PREFIXES,
    schemes=(ORIGINAL,),
    style="lora_A",
    always_alpha=False,
    tokens=False,
    kinds=frozenset({"lora", "dora", "full"}),
    whole=True,
)


def _detect(file: AdapterFile) -> bool:
    names = [split[0] for key in file.tensors if (split := split_key(key))]
    # A pipeline's file has a component before each name; one of a single model may have diffusers' names.
    if file.config is not None or all(name.startswith(_COMPONENTS) for name in names):
        return False
    return recognise_scheme(names) not in (None, CANONICAL)


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    return read(file, names, "original", PREFIXES)


def _write(adapter: Adapter) -> Written:
    return write(adapter, _SPELLING, {})


FORMAT = Format(
    "original", "names of the model's own code (BFL control, OneTrainer original)", 86, _detect, _read, _write
)
