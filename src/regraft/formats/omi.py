"""OMI names, as older releases of OneTrainer wrote them: dotted original names behind a component's short name.

Facts (OneTrainer before its present format options; facts alone, it is AGPL):

- Prefixes ``unet.`` or ``transformer.``, ``clip_l.``, ``clip_g.``, ``t5.``; original names; ``lora_down``, ``lora_up``,
  ``alpha``, ``dora_scale``.
- Parts of a fused projection stand apart, by number: ``double_blocks.0.img_attn.qkv.0`` to ``.2``,
  ``single_blocks.0.linear1.0`` to ``.3``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from regraft.adapter import Adapter
from regraft.families import ORIGINAL, Family, Piece, get_family
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._emit import Spelling, write
from regraft.formats._factors import cannot_hold
from regraft.formats._grammar import MAIN, Prefix, read
from regraft.formats._naming import Table

PREFIXES = (
    Prefix("unet.", MAIN, flat=False),
    Prefix("transformer.", MAIN, flat=False),
    Prefix("clip_l.", "text_encoder", flat=False),
    Prefix("clip_g.", "text_encoder_2", flat=False),
    Prefix("t5.", "text_encoder_3", flat=False),
)
_SPELLING = Spelling("omi", PREFIXES, schemes=("omi",), homes={"transformer": "transformer."})
_KEY = re.compile(
    r"(clip_[lg]|t5)\..+\.lora_down\.weight"
    r"|(unet|transformer)\.(input_blocks|middle_block|output_blocks|double_blocks|single_blocks|joint_blocks|blocks)\..+\.lora_down\.weight"
)


_NAMINGS = ("unet", "sd3", "flux", "hunyuan-video")
# The number of a part behind a fused projection's name.
_PART = re.compile(r"(?<=qkv|ar1)\.\d$")


def _parts(schemes: Mapping[str, Table]) -> dict[str, Table]:
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name, held in schemes.get(ORIGINAL, Table({})).pieces.items():
        stem, dot, last = name.rpartition(".")
        if len(held) == 1:
            pieces[name] = held
        else:
            pieces |= {f"{stem}.{i}{dot}{last}": (Piece(piece.name),) for i, piece in enumerate(held)}
    return {"omi": Table(pieces)} if pieces else {}


def _detect(file: AdapterFile) -> bool:
    return any(_KEY.fullmatch(key) for key in file.tensors)


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    return read(file, names, "omi", PREFIXES, extra=_parts, whole=lambda name: _PART.sub("", name))


def _has_names(family: Family | None) -> bool:
    if family is None or family.naming not in _NAMINGS or family.main not in family.components:
        return False
    return ORIGINAL in family.table(family.main).schemes


def _write(adapter: Adapter) -> Written:
    if adapter.format != "omi" and not _has_names(get_family(adapter.family)):
        remedy = "OMI names exist for SD, SDXL, SD 3, Flux and HunyuanVideo."
        raise cannot_hold("OMI", "an adapter of this model", adapter.family, remedy)
    return write(adapter, _SPELLING, {}, extra=_parts)


FORMAT = Format("omi", "OMI names (older OneTrainer)", 88, _detect, _read, _write)
