"""One family of models: what its file says, and its tables when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from typing import Any, TypeVar

from regraft.adapter import MODEL
from regraft.families._tables import Piece, Table, table
from regraft.tensors import Shape

T = TypeVar("T")


class _Lazy(Mapping[str, T]):
    """Component → what is read from its table when it is asked for."""

    def __init__(self, components: Mapping[str, str], read: Callable[[Table], T]) -> None:
        self._components, self._read = components, read
        self._values: dict[str, T] = {}

    def __getitem__(self, component: str) -> T:
        if component not in self._values:
            self._values[component] = self._read(table(self._components[component]))
        return self._values[component]

    def __contains__(self, component: object) -> bool:
        return component in self._components

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)


@dataclass(frozen=True, eq=False)
class Family:
    """One data file.

    Attributes:
        name: of the file.
        title: for people.
        priority: order of recognition, lowest first.
        naming: families of equal naming can't always be told apart by an adapter's names alone.
        main: the component that an adapter of a single model changes; ``model`` where there are no components.
        components: component → name of its table; empty for families that are told by patterns alone.
        roots: component → beginnings under which whole-pipeline checkpoints keep it in its original names, the most
            usual first; ``""`` where a file holds nothing else.
        varying: modules whose shape differs between variants of one family (inpainting's first convolution).
        descends: the family that this one is a fine-tune of: same tables, told apart by metadata alone.
        rules: the patterns by which names are recognised.
        data: everything else in the file.
    """

    name: str
    title: str
    priority: int
    naming: str
    main: str
    components: Mapping[str, str] = field(default_factory=dict)
    roots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    varying: tuple[str, ...] = ()
    descends: str | None = None
    rules: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> Mapping[str, Mapping[str, Shape]]:
        """Component → canonical (diffusers, transformers) parameter → shape, biases and norms included."""
        return _Lazy(self.components, lambda one: one.parameters)

    @cached_property
    def original(self) -> Mapping[str, Mapping[str, tuple[Piece, ...]]]:
        """Component → original parameter → its pieces: one for a rename, several for a fused weight."""
        return _Lazy(self.components, lambda one: one.original)

    @cached_property
    def spellings(self) -> Mapping[str, Mapping[str, Mapping[str, str]]]:
        """Component → scheme → that scheme's parameter → the original one."""
        return _Lazy(self.components, lambda one: one.spellings)

    @cached_property
    def tables(self) -> Mapping[str, Mapping[str, Shape]]:
        """Component → canonical module → shape of its weight."""
        return _Lazy(self.components, lambda one: one.modules)

    @cached_property
    def sgm(self) -> Mapping[str, Mapping[str, str]]:
        """``unet`` → canonical module → its name in the original (sgm) code."""
        unets = {name: one for name, one in self.components.items() if name == "unet"}
        return _Lazy(unets, _module_names)

    def table(self, component: str) -> Table:
        """The component's table; KeyError if the family has none."""
        return table(self.components[component])


def _module_names(one: Table) -> dict[str, str]:
    return {
        pieces[0].name.removesuffix(".weight"): name.removesuffix(".weight")
        for name, pieces in one.original.items()
        if name.endswith(".weight") and len(pieces) == 1
    }


@cache
def families() -> dict[str, Family]:
    """Every family by name, in the order of recognition."""
    found = []
    for file in resources.files("regraft.families").iterdir():
        name, dot, _ = file.name.rpartition(".json")
        if dot and not name.startswith("_"):
            found.append(_family(name, json.loads(file.read_text(encoding="utf-8"))))
    return {family.name: family for family in sorted(found, key=lambda f: (f.priority, f.name))}


def _family(name: str, data: Mapping[str, Any]) -> Family:
    return Family(
        name,
        data["title"],
        data["priority"],
        data["naming"],
        data.get("main", MODEL),
        data.get("components", {}),
        {component: tuple(roots) for component, roots in data.get("roots", {}).items()},
        tuple(data.get("varying", ())),
        data.get("descends"),
        data.get("recognise", {}),
        data,
    )


def get_family(name: str | None) -> Family | None:
    """The family of that name, or None."""
    return families().get(name) if name else None
