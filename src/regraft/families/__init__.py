"""Model families as data: one JSON file each, read here. Adding a family is adding a file.

A file either lists every module of the family with its weight's shape (``components``), or says by patterns how its
names look (``adapter``, ``base``, ``config``). `docs/formats.md` explains the fields.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from math import prod
from typing import TYPE_CHECKING, Any

from regraft.adapter import MODEL
from regraft.tensors import Shape

if TYPE_CHECKING:
    from regraft.base import Base

#: Component → module path → shape of ΔW or of the weight.
Modules = Mapping[str, Mapping[str, Shape]]

# Share of an adapter's modules that must be in a family's table; the rest may be extras such as a new input layer.
_ENOUGH = 0.9
_MAIN = ("unet", "transformer", "prior", MODEL)


@dataclass(frozen=True)
class Family:
    """One data file.

    Attributes:
        name: of the file.
        title: for people.
        priority: order of recognition, lowest first.
        naming: families of equal naming can't always be told apart by an adapter's names alone.
        main: the component that an adapter of a single model changes; ``model`` where there are no components.
        tables: component → module path → weight shape.
        sgm: component → module path → name in the original code.
        varying: modules whose shape differs between variants of one family (inpainting's first convolution).
        rules: the patterns by which names are recognised.
        data: everything else in the file.
    """

    name: str
    title: str
    priority: int
    naming: str
    main: str
    tables: Mapping[str, Mapping[str, Shape]] = field(default_factory=dict)
    sgm: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    varying: tuple[str, ...] = ()
    rules: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


@cache
def families() -> dict[str, Family]:
    """Every family by name, in the order of recognition."""
    found = []
    for file in resources.files(__name__).iterdir():
        name, _, suffix = file.name.partition(".")
        if suffix not in ("json", "json.gz") or name.startswith("_"):
            continue
        raw = file.read_bytes()
        found.append(_family(name, json.loads(gzip.decompress(raw) if suffix == "json.gz" else raw)))
    return {family.name: family for family in sorted(found, key=lambda f: (f.priority, f.name))}


def _family(name: str, data: Mapping[str, Any]) -> Family:
    components: Mapping[str, Any] = data.get("components", {})
    return Family(
        name,
        data["title"],
        data["priority"],
        data["naming"],
        data.get("main", MODEL),
        {c: {path: tuple(shape) for path, shape in t["modules"].items()} for c, t in components.items()},
        {c: t["sgm"] for c, t in components.items() if "sgm" in t},
        tuple(data.get("varying", ())),
        data.get("recognise", {}),
        data,
    )


def get_family(name: str | None) -> Family | None:
    """The family of that name, or None."""
    return families().get(name) if name else None


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
    # Two families that list their modules with shapes are told apart; a pattern may stand for any of its kind.
    return one.naming == two.naming and not (one.tables and two.tables)


def without_text_model(path: str) -> str:
    """The path without the ``text_model.`` level, which transformers 5 leaves out of CLIPTextModel."""
    return path.removeprefix("text_model.")


def _alike(one: Shape, two: Shape) -> bool:
    # A 1 × 1 convolution and a linear layer of the same width hold the same update.
    return one[:2] == two[:2] and prod(one) == prod(two)


def find_shape(family: str, component: str, path: str) -> Shape | None:
    """Shape of a module's weight by the family's table, with or without ``text_model.``; None if it isn't there."""
    known = get_family(family)
    table = known.tables.get(component, {}) if known else {}
    return table.get(path) or table.get(f"text_model.{path}")


def _fits_tables(family: Family, modules: Modules) -> bool:
    if family.main not in modules and not (set(modules) == {MODEL} and family.main in family.tables):
        return False
    known = total = 0
    for component, paths in modules.items():
        name = family.main if component == MODEL else component
        for path, shape in paths.items():
            total += 1
            expected = find_shape(family.name, name, path)
            if expected is not None and not _alike(expected, shape) and path not in family.varying:
                return False
            known += expected is not None
    return total > 0 and known >= _ENOUGH * total


def _fits_names(rules: Mapping[str, Any], names: list[str], *, every: bool) -> bool:
    if every and not all(re.search(rules["every"], name) for name in names):
        return False
    some = rules.get("some", [])
    absent = rules.get("absent", [])
    return all(any(re.search(pattern, name) for name in names) for pattern in some) and not any(
        re.search(pattern, name) for pattern in absent for name in names
    )


def _main_of(components: Mapping[str, Any]) -> str | None:
    return next((name for name in (*_MAIN, *components) if components.get(name)), None)


def family_of_modules(modules: Modules) -> str | None:
    """The family that an adapter's modules belong to, or None.

    Families that list their modules are told by names and shapes; the others by names alone, so that the answer is
    the common one of families with the same naming (``llama`` for Mistral and Qwen2 too; see `same_naming`).

    Args:
        modules: component → module path → shape of ΔW: (out, in) or (out, in, kh, kw).
    """
    main = _main_of(modules)
    if main is None:
        return None
    names = list(modules[main])
    for family in families().values():
        if family.tables:
            if _fits_tables(family, modules):
                return family.name
        elif "adapter" in family.rules and _fits_names(family.rules["adapter"], names, every=True):
            return family.name
    return None


def refine_by_hint(family: str | None, hint: str) -> str | None:
    """A family of the same naming that ``hint`` (the base's class or path, as a config tells it) speaks of."""
    known = get_family(family)
    if known is None or known.tables:
        return family
    for other in families().values():
        pattern = other.rules.get("hint")
        if other.naming == known.naming and pattern and re.search(pattern, hint, re.IGNORECASE):
            return other.name
    return family


def family_of_base(base: Base) -> str | None:
    """The family of a base model by its names, shapes and ``config.json``, or None. No tensor is read."""
    main = _main_of(base.components)
    if main is None:
        return None
    tensors = base.components[main]
    config = base.configs.get(main, {})
    kind = str(config.get("model_type") or config.get("_class_name") or "")
    named = [family for family in families().values() if kind and kind in family.rules.get("config", [])]
    for family in families().values():
        if family.tables:
            table = family.tables.get(family.main, {}) if main in (MODEL, family.main) else {}
            fixed = {path: shape for path, shape in table.items() if path not in family.varying}
            if fixed and all(_has(tensors, f"{path}.weight", shape) for path, shape in fixed.items()):
                return family.name
            original = family.data.get("original", {})
            if original and all(_has(tensors, name, tuple(shape)) for name, shape in original.items()):
                return family.name
    if named:
        return named[0].name
    for family in families().values():
        if "base" in family.rules and _fits_names(family.rules["base"], list(tensors), every=False):
            return family.name
    return None


def _has(tensors: Mapping[str, Any], name: str, shape: Shape) -> bool:
    return name in tensors and _alike(tuple(tensors[name].shape), shape)


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
    for name in known.tables:
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
