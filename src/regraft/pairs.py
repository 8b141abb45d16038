"""Known pairs of bases: what changes between them, and by which tier an adapter crosses.

The data is ``families/_pairs.json``; what the families' own tables say of a pair is computed from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

from regraft.families import get_family
from regraft.tensors import Shape

Tier = Literal["port", "refine", "bridge"]


@dataclass(frozen=True)
class Pair:
    """One upgrade that people make.

    Attributes:
        name: short, unique.
        title: for people.
        old, new: families; equal where a family's fine-tunes are meant.
        tier: the one that usually applies; `check` judges the bases at hand.
        changes: what changes, in sentences.
        widened: module → input channels in the old and in the new base; the added ones stay the new base's.
        components: component of the old base → those of the new one that take its update, where not the same.
        prediction: what old and new bases predict, where it may differ.
        examples: hub ids, old → new.
    """

    name: str
    title: str
    old: str
    new: str
    tier: Tier
    changes: tuple[str, ...]
    widened: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    components: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prediction: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """What two families' tables of one component differ in, by module.

    Attributes:
        removed: modules of the old one alone.
        added: modules of the new one alone.
        reshaped: module → its weight's shape in the old and in the new one.
    """

    removed: tuple[str, ...]
    added: tuple[str, ...]
    reshaped: Mapping[str, tuple[Shape, Shape]]


@cache
def pairs() -> tuple[Pair, ...]:
    """Every known pair, in the order of the file."""
    text = resources.files("regraft.families").joinpath("_pairs.json").read_text(encoding="utf-8")
    return tuple(_pair(entry) for entry in json.loads(text))


def _pair(entry: Mapping[str, Any]) -> Pair:
    return Pair(
        entry["name"],
        entry["title"],
        entry["from"],
        entry["to"],
        entry["tier"],
        tuple(entry["changes"]),
        {module: (old, new) for module, (old, new) in entry.get("widened", {}).items()},
        {old: tuple(new) for old, new in entry.get("components", {}).items()},
        entry.get("prediction", {}),
        tuple(entry["examples"]),
    )


def known(old_family: str | None, new_family: str | None) -> Pair | None:
    """The known pair of two families, or None.

    A fine-tune that regraft knows by name (Pony) stands for its ancestor (SDXL) where no pair names it.
    """
    olds, news = _line(old_family), _line(new_family)
    # Two versions of one fine-tune are a pair of its ancestor's fine-tunes, not an upgrade to it.
    sought = [(name, name) for name in olds] if olds == news else [(old, new) for old in olds for new in news]
    named = {(pair.old, pair.new): pair for pair in reversed(pairs())}
    return next((named[names] for names in sought if names in named), None)


def _line(name: str | None) -> list[str]:
    line = []
    while name is not None:
        line.append(name)
        family = get_family(name)
        name = family.descends if family else None
    return line


def difference(old_family: str, new_family: str, component: str) -> Difference | None:
    """What the tables of two families say of one component; None where one of them has no table of it."""
    old, new = get_family(old_family), get_family(new_family)
    if old is None or new is None or component not in old.components or component not in new.components:
        return None
    one, two = old.tables[component], new.tables[component]
    return Difference(
        tuple(path for path in one if path not in two),
        tuple(path for path in two if path not in one),
        {path: (shape, two[path]) for path, shape in one.items() if path in two and two[path] != shape},
    )
