"""ComfyUI's own names: ``diffusion_model.`` and ``text_encoders.`` before the dotted names of each model's code.

Facts (ComfyUI 0.3.64; facts alone, it is GPL):

- Key: ``diffusion_model.`` + the module's name in ComfyUI's code + ``lora_A/lora_B``, ``lora_down/lora_up`` or one of
  the other spellings of the pair; text encoders as ``text_encoders.clip_l.transformer.`` and the like.
- Scale = alpha / rank where there is ``.alpha``, else 1. ``.dora_scale``, ``.lora_mid.weight`` are siblings.
- ``.diff`` and ``.diff_b`` are the change of a weight and of a bias, ``.set_weight`` a new value.
- "Extract and Save Lora": ``lora_up/lora_down`` without alpha, norms as ``.diff``, biases as ``.diff_b``.
- Who else writes it: musubi-tuner's ``convert_lora --target other`` (alpha folded into both factors), AI-Toolkit (Wan,
  HunyuanVideo, Chroma, … ; Flux as diffusers files), OneTrainer's COMFY (keeps ``.alpha``), diffusion-pipe (with the
  prefix ``transformer.``).
- HunyuanVideo: ComfyUI renames (``img_attn.qkv``, ``img_mlp.0``); musubi's and older files have the original names
  (``img_attn_qkv``, ``img_mlp.fc1``). ComfyUI reads both.
"""

from __future__ import annotations

from regraft.adapter import Adapter
from regraft.families import ORIGINAL
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._emit import Spelling, write
from regraft.formats._grammar import MAIN, Prefix, read
from regraft.formats._naming import recognise_scheme
from regraft.formats._suffixes import SPELT, split_key

PREFIXES = (
    Prefix("diffusion_model.", MAIN, flat=False),
    Prefix("transformer.", MAIN, flat=False),
    Prefix("text_encoders.clip_l.transformer.", "text_encoder", flat=False),
    Prefix("text_encoders.clip_g.transformer.", "text_encoder_2", flat=False),
    Prefix("text_encoders.t5xxl.transformer.", "text_encoder_3", flat=False),
)
_SPELLING = Spelling("comfyui", PREFIXES, schemes=("comfy", ORIGINAL), style="lora_A", always_alpha=False, kinds=SPELT)
_SURE = ("diffusion_model.", "text_encoders.")


def _detect(file: AdapterFile) -> bool:
    if any(key.startswith(_SURE) and split_key(key) for key in file.tensors):
        return True
    bare = [key.removeprefix("transformer.") for key in file.tensors if key.startswith("transformer.")]
    names = [split[0] for key in bare if (split := split_key(key))]
    # diffusion-pipe: diffusers' prefix before the original names.
    return bool(names) and recognise_scheme(names) not in (None, "canonical")


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    return read(file, names, "comfyui", PREFIXES)


def _write(adapter: Adapter) -> Written:
    return write(adapter, _SPELLING, {})


FORMAT = Format(
    "comfyui", "ComfyUI's own names (diffusion_model.…); AI-Toolkit, diffusion-pipe", 84, _detect, _read, _write
)
