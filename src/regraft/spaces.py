"""Which hidden space each weight reads and writes, by its role; the data is ``families/_spaces.json``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from regraft.adapter import ModuleRef
from regraft.tensors import Shape

Space = tuple[str, str, int, int]
"""Component, name, size in the old base, size in the new one."""


@dataclass(frozen=True)
class NamedSides:
    """The spaces of one weight; None stands for coordinates that mean something outside of the weights.

    Attributes:
        out: that it writes.
        inp: that it reads.
        out_copies: its rows are that many stacked copies of ``out``.
    """

    out: str | None
    inp: str | None
    out_copies: int = 1


@cache
def _rules() -> list[dict[str, Any]]:
    text = files("regraft.families").joinpath("_spaces.json").read_text(encoding="utf-8")
    rules: list[dict[str, Any]] = json.loads(text)["rules"]
    return [{**rule, "match": re.compile(rule["match"])} for rule in rules]


@cache
def named_sides(path: str) -> NamedSides:
    """The spaces of the module at ``path``.

    >>> named_sides("model.layers.3.mlp.down_proj")
    NamedSides(out='residual', inp='model.layers.3.mlp', out_copies=1)
    """
    for rule in _rules():
        found = rule["match"].fullmatch(path)
        if found:
            out, inp = (found.expand(rule[side]) if side in rule else None for side in ("out", "in"))
            return NamedSides(out, inp, rule.get("out_copies", 1))
    return NamedSides(None, None)


@dataclass(frozen=True)
class Sides:
    """The spaces of one pair of weights, with their sizes; None stands for coordinates that both bases share.

    Attributes:
        out: that it writes.
        inp: that it reads.
        out_copies: its rows are that many stacked copies of ``out``.
    """

    out: Space | None
    inp: Space | None
    out_copies: int = 1


def sides_of(module: ModuleRef, old: Shape, new: Shape) -> Sides:
    """The spaces of a module whose weight is (out, in) = ``old`` in the old base and ``new`` in the new one."""

    def space(name: str | None, axis: int, copies: int) -> Space | None:
        m, m_new = old[axis] // copies, new[axis] // copies
        if name is None:
            # A fixed space keeps its coordinates, unless the two bases disagree on its size.
            return None if m == m_new else (module.component, f"{module.path}:{axis}", m, m_new)
        return (module.component, name, m, m_new)

    sides = named_sides(module.path)
    return Sides(space(sides.out, 0, sides.out_copies), space(sides.inp, 1, 1), sides.out_copies)
