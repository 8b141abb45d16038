"""musubi-tuner: LoRA for video and newer image transformers, in kohya's grammar.

Facts (musubi-tuner 30c658c):

- Prefix ``lora_unet`` always, no text encoders; the names of each model's own code as musubi has it: Wan
  ``blocks_N_self_attn_q``, HunyuanVideo ``double_blocks_N_img_attn_qkv`` (fused), FramePack and Qwen-Image diffusers
  names (``transformer_blocks_N_attn_to_q``).
- Scale, alpha and convolutions as in kohya's files. LoHa and LoKr (LyCORIS' suffixes) since 2026.
- ``convert_lora.py --target other`` writes ComfyUI's names instead: see `regraft.formats.comfyui`.
- Wan 2.2: one file for each expert (high and low noise) with equal keys, or one file for both; nothing in the keys
  tells which.
"""

from __future__ import annotations

import re

from regraft.adapter import Adapter
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._emit import Spelling, write
from regraft.formats.kohya import PREFIXES, is_flat, read_flat, stated

_SPELLING = Spelling("musubi", PREFIXES[:1], tokens=False, kinds=frozenset({"lora", "loha", "lokr"}))
# ss_base_model_version of the models that musubi trains and sd-scripts does not.
_VERSIONS = re.compile(
    r"hunyuan_?video|wan|framepack|fpack|flux_?kontext|flux_?2|qwen_?image|z_?image|kandinsky|ltx", re.IGNORECASE
)
_NAMES = re.compile(r"lora_unet_(blocks_\d+_(self|cross)_attn_|double_blocks_\d+_(img|txt)_mlp_fc|blocks_\d+_ffn_)")


def _detect(file: AdapterFile) -> bool:
    if not is_flat(file):
        return False
    if _VERSIONS.match(file.metadata.get("ss_base_model_version", "")):
        return True
    return any(_NAMES.match(key) for key in file.tensors)


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    return read_flat(file, names, "musubi")


def _write(adapter: Adapter) -> Written:
    return write(adapter, _SPELLING, stated(adapter, "networks.lora"))


FORMAT = Format("musubi", "musubi-tuner (Wan, HunyuanVideo, FramePack, Qwen-Image, …)", 66, _detect, _read, _write)
