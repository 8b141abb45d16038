"""llama.cpp's names (GGUF) of language models' parameters, and what its files do to values beside renaming."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")


class Renames:
    """Names of one family, both ways; block numbers are carried over.

    >>> gguf_names("llama").canonical("blk.7.attn_q.weight")
    'model.layers.7.self_attn.q_proj.weight'
    >>> gguf_names("llama").spelled("model.layers.7.self_attn.q_proj")
    'blk.7.attn_q'
    """

    def __init__(self, rows: Mapping[str, str]) -> None:
        modules = {
            old.removesuffix(".weight"): new.removesuffix(".weight")
            for old, new in rows.items()
            if old.endswith(".weight") and new.endswith(".weight")
        }
        pairs = [*rows.items(), *modules.items()]
        self._canonical = dict(pairs)
        # Two names may lead to one parameter; the first is the usual one.
        self._spelled = {new: old for old, new in reversed(pairs)}

    def canonical(self, name: str) -> str | None:
        """The canonical module or parameter of a name, or None."""
        return _renamed(self._canonical, name)

    def spelled(self, name: str) -> str | None:
        """The name of a canonical module or parameter, or None."""
        return _renamed(self._spelled, name)


def _renamed(table: Mapping[str, str], name: str) -> str | None:
    # The first number is the block's; later ones (T5's sub-layers) belong to the name.
    block = _BLOCK.search(name)
    if block is None:
        return table.get(name)
    target = table.get(f"{name[: block.start()]}{{}}{name[block.end() :]}")
    return target and target.replace("{}", block[0], 1)


@cache
def _data() -> Mapping[str, Any]:
    text = resources.files("regraft.families").joinpath("_gguf.json").read_text(encoding="utf-8")
    data: Mapping[str, Any] = json.loads(text)
    return data


@cache
def gguf_names(family: str) -> Renames:
    """GGUF's names of a family's parameters; KeyError where llama.cpp has none (see `gguf_families`)."""
    return Renames(_data()[family]["names"])


def gguf_families(arch: str | None = None) -> list[str]:
    """Families that llama.cpp has names for; only those of one ``general.architecture``, if given."""
    return [family for family, entry in _data().items() if arch in (None, entry["arch"])]


def gguf_architecture(family: str) -> str | None:
    """What ``general.architecture`` says for a family, or None."""
    entry = _data().get(family)
    return str(entry["arch"]) if entry else None


def gguf_values(family: str) -> Mapping[str, list[str]]:
    """What is done to values: how → last parts of the GGUF modules that it is done to.

    ``permuted``: within each head, rows of the two rotary halves alternate; ``transposed``; ``plus_one``: added to
    norms; ``by_part``: q, k and v stacked, where the canonical weight has them head by head.
    """
    values: Mapping[str, list[str]] = _data()[family]["values"]
    return values
