"""Model families as data: one JSON file each, read here. Adding a family is adding a file.

A family's file names the tables of its components (``tables/``: every parameter with its shape, and its name in the
original code), or says by patterns how its names look. `docs/formats.md` explains the fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regraft.adapter import MODEL
from regraft.families._family import Family, families, get_family
from regraft.families._gguf import Renames, gguf_architecture, gguf_families, gguf_names, gguf_values
from regraft.families._recognise import (
    GGUF,
    Match,
    Recognition,
    alike,
    family_of_modules,
    fits_names,
    main_of,
    recognise,
)
from regraft.families._tables import CANONICAL, ORIGINAL, Named, Piece, Table, flattened, table
from regraft.tensors import Shape

if TYPE_CHECKING:
    from regraft.base import Base

__all__ = [
    "CANONICAL",
    "GGUF",
    "ORIGINAL",
    "Family",
    "Match",
    "Modules",
    "Named",
    "Piece",
    "Recognition",
    "Renames",
    "Table",
    "aliases",
    "block_names",
    "block_of",
    "families",
    "family_of_base",
    "family_of_modules",
    "find_shape",
    "flattened",
    "get_family",
    "gguf_architecture",
    "gguf_families",
    "gguf_names",
    "gguf_values",
    "module_names",
    "recognise",
    "refine_by_hint",
    "same_naming",
    "table",
    "without_text_model",
]

#: Component → module path → shape of ΔW or of the weight.
Modules = Mapping[str, Mapping[str, Shape]]


def module_names(family: str, component: str) -> dict[str, Shape]:
    """Module path → weight shape of a family that lists them, in the order of its state dict; else empty."""
    known = get_family(family)
    return dict(known.tables.get(component, {})) if known else {}


def aliases(family: str, component: str) -> dict[str, str]:
    """Module path → its name in the original (sgm) code; empty where there is none."""
    known = get_family(family)
    return dict(known.sgm.get(component, {})) if known else {}


def same_naming(first: str | None, second: str | None) -> bool:
    """Whether an adapter recognised as ``first`` may well be one of ``second``: names alone can't tell them apart."""
    one, two = get_family(first), get_family(second)
    if one is None or two is None or one == two:
        return True
    if _ancestor(one) == _ancestor(two):
        return True
    # Two families that list their modules with shapes are told apart; a pattern may stand for any of its kind.
    return one.naming == two.naming and not (one.components and two.components)


def _ancestor(family: Family) -> str:
    while family.descends and (older := get_family(family.descends)):
        family = older
    return family.name


def without_text_model(path: str) -> str:
    """The path without the ``text_model.`` level, which transformers 5 leaves out of CLIPTextModel."""
    return path.removeprefix("text_model.")


def find_shape(family: str, component: str, path: str) -> Shape | None:
    """Shape of a module's weight by the family's table, with or without ``text_model.``; None if it isn't there."""
    known = get_family(family)
    table = known.tables.get(component, {}) if known else {}
    return table.get(path) or table.get(f"text_model.{path}")


def refine_by_hint(family: str | None, hint: str) -> str | None:
    """A family of the same naming that ``hint`` (the base's class or path, as a config tells it) speaks of."""
    known = get_family(family)
    if known is None or known.components:
        return family
    for other in families().values():
        pattern = other.rules.get("hint")
        if other.naming == known.naming and pattern and re.search(pattern, hint, re.IGNORECASE):
            return other.name
    return family


def family_of_base(base: Base) -> str | None:
    """The family of a base model by its names, shapes and ``config.json``, or None. No tensor is read."""
    main = main_of(base.components)
    if main is None:
        return None
    tensors = base.components[main]
    config = base.configs.get(main, {})
    kind = str(config.get("model_type") or config.get("_class_name") or "")
    named = [family for family in families().values() if kind and kind in family.rules.get("config", [])]
    for family in families().values():
        if main in (MODEL, family.main) and not family.descends and _holds(tensors, family):
            return _of_more_components(family, base).name
    if named:
        return named[0].name
    for family in families().values():
        if "base" in family.rules and fits_names(family.rules["base"], list(tensors), every=False):
            return family.name
    return None


def _of_more_components(family: Family, base: Base) -> Family:
    """Of the families of one table, the one that the other components speak of: Wan 2.2 has two transformers."""
    for other in families().values():
        wanted = other.rules.get("components")
        if (
            wanted
            and other.components[other.main] == family.components[family.main]
            and base.components.keys() >= {*wanted}
        ):
            return other
    return family


def _holds(tensors: Mapping[str, Any], family: Family) -> bool:
    """Whether all of the main model's weights are there, in canonical names or, in a whole checkpoint, the original."""
    if family.main not in family.components:
        return False
    one = family.table(family.main)
    first = next(iter(one.data["parameters"]))
    if "{" in first or first in tensors or f"{first}.weight" in tensors:
        fixed = {path: shape for path, shape in one.modules.items() if path not in family.varying}
        if all(_has(tensors, f"{path}.weight", shape) for path, shape in fixed.items()):
            return True
    marks: Mapping[str, Any] = family.rules.get("checkpoint", {})
    return bool(marks) and all(_has(tensors, name, tuple(shape)) for name, shape in marks.items())


def _has(tensors: Mapping[str, Any], name: str, shape: Shape) -> bool:
    return name in tensors and alike(tuple(tensors[name].shape), shape)


def block_of(family: str | None, module: str, component: str | None = None) -> str | None:
    """The block that a module counts to when strengths are given per block: ``BASE``, ``IN04``, ``M00``, ``OUT11``.

    Args:
        family: name of a family that lists its modules.
        module: path, with or without its component in front (``unet.down_blocks…``).
        component: where the path doesn't say it.
    """
    known = get_family(family)
    if known is None:
        return None
    for name in known.components:
        if component in (None, name) and module.startswith(f"{name}."):
            component, module = name, module.removeprefix(f"{name}.")
            break
    if component is not None and component.startswith("text_encoder"):
        return "BASE"
    original = known.sgm.get(known.main, {}).get(module)
    found = re.match(r"(input|output)_blocks\.(\d+)\.|middle_block\.", original or "")
    if found is None:
        return "BASE" if re.match(r"(text_model\.)?encoder\.layers\.", module) else None
    side = {"input": "IN", "output": "OUT", None: "M"}[found[1]]
    return f"{side}{int(found[2] or 0):02}"


def block_names(family: str | None, count: int) -> list[str] | None:
    """Names of the blocks that ``count`` strengths stand for (SD 1.5: 17 or 26, SDXL: 12 or 20); None if unknown."""
    known = get_family(family)
    return known.data.get("blocks", {}).get(str(count)) if known else None
