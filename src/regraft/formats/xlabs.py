"""XLabs' Flux LoRA: attention processors of Flux' own code.

Facts (XLabs-AI x-flux; diffusers 0.42.1 reads it):

- ``double_blocks.N.processor.qkv_lora1`` and ``proj_lora1`` are the image stream's, ``…_lora2`` the text stream's;
  ``single_blocks.N.processor.qkv_lora`` and ``proj_lora``. Then ``.down.weight`` and ``.up.weight``.
- ``qkv`` is fused, in single blocks too: there it is the first three of ``linear1``'s parts, without the MLP.
- No alpha: scale 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from regraft.adapter import Adapter
from regraft.families import CANONICAL, Piece
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._emit import Spelling, write
from regraft.formats._grammar import MAIN, Prefix, read
from regraft.formats._naming import Table

# Canonical block → (name of the processor's part without "_lora…", suffix of it, modules it holds).
_PARTS = {
    "transformer_blocks": (
        ("double_blocks", "qkv_lora1", ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("double_blocks", "proj_lora1", ("attn.to_out.0",)),
        ("double_blocks", "qkv_lora2", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        ("double_blocks", "proj_lora2", ("attn.to_add_out",)),
    ),
    "single_transformer_blocks": (
        ("single_blocks", "qkv_lora", ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("single_blocks", "proj_lora", ("proj_out",)),
    ),
}
_BLOCK = re.compile(r"(single_transformer_blocks|transformer_blocks)\.(\d+)\.")
_KEY = re.compile(r"(double|single)_blocks\.\d+\.processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight")


def _processors(schemes: Mapping[str, Table]) -> dict[str, Table]:
    known = schemes.get(CANONICAL, Table({})).pieces
    blocks = {(found[1], found[2]) for name in known if (found := _BLOCK.match(name))}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for kind, number in sorted(blocks):
        for original, part, modules in _PARTS[kind]:
            names = [f"{kind}.{number}.{module}.weight" for module in modules]
            # Equal parts: the rows are scaled to the weight's own.
            rows = [((i, i + 1),) if len(names) > 1 else None for i in range(len(names))]
            held = tuple(Piece(name, row) for name, row in zip(names, rows, strict=True))
            pieces[f"{original}.{number}.processor.{part}.weight"] = held
    return {"xlabs": Table(pieces)}


PREFIXES = (Prefix("", MAIN, flat=False), Prefix("diffusion_model.", MAIN, flat=False))
_SPELLING = Spelling(
    "xlabs", PREFIXES, schemes=("xlabs",), style="bare", always_alpha=False, tokens=False, kinds=frozenset({"lora"})
)


def _detect(file: AdapterFile) -> bool:
    return any(_KEY.search(key) for key in file.tensors)


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    return read(file, names, "xlabs", PREFIXES, extra=_processors, home="flux")


def _write(adapter: Adapter) -> Written:
    return write(adapter, _SPELLING, {}, extra=_processors)


FORMAT = Format("xlabs", "XLabs Flux LoRA (attention processors)", 90, _detect, _read, _write)
