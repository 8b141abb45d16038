"""LyCORIS: LoCon, LoHa, LoKr, full, IA3, GLoRA, diag-OFT, BOFT and norms, in kohya's grammar.

Facts (lycoris-lora 3.2.0.post2 and 4.1.3):

- Key: as kohya's, with the algorithm's own suffixes (`regraft.formats._suffixes`); one file may mix algorithms.
  SimpleTuner writes ``lycoris_`` for the prefix, and the host model's diffusers names.
- Scale = alpha / r. ``rs_lora`` has multiplied the stored alpha already: no second square root. With both halves of a
  LoKr full, the scale is 1 whatever alpha says. ``alpha`` beside ``oft_blocks`` is the constraint of the rotation.
- ``dora_scale`` is per output row, (out, 1, …), or per input column, (1, in, …) with ``wd_on_output=False``.
- ``bypass_mode`` changes how the update is computed, not what is stored.
- A norm's change is ``.w_norm``, its bias' ``.b_norm`` beside it; LyCORIS fails at a norm's ``.diff``.
- Names follow the host's U-Net: sgm under sd-scripts, diffusers under diffusers.
"""

from __future__ import annotations

import re

from regraft.adapter import Adapter
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._emit import Spelling, write
from regraft.formats._suffixes import SPELT
from regraft.formats.kohya import PREFIXES, is_flat, read_flat, stated

_SPELLING = Spelling("lycoris", PREFIXES, kinds=SPELT, norms=True)
_SUFFIX = re.compile(
    r"\.(hada_w1_a|lokr_w[12](_a)?|lora_mid\.weight|oft_blocks|on_input|a1\.weight|diff|diff_b|w_norm|b_norm)$"
)


def _detect(file: AdapterFile) -> bool:
    if not is_flat(file):
        return False
    named = "lycoris" in file.metadata.get("ss_network_module", "") or any(
        k.startswith("lycoris_") for k in file.tensors
    )
    return named or any(_SUFFIX.search(key) for key in file.tensors)


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    return read_flat(file, names, "lycoris")


def _write(adapter: Adapter) -> Written:
    return write(adapter, _SPELLING, stated(adapter, "lycoris.kohya"))


FORMAT = Format("lycoris", "LyCORIS (LoHa, LoKr, OFT, full, … in kohya's grammar)", 64, _detect, _read, _write)
