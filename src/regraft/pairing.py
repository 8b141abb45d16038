"""Which module of the old base answers to which of the new: by name, by depth where blocks were added or removed."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from regraft.adapter import MODEL, ModuleRef
from regraft.base import Base
from regraft.names import resolve_names
from regraft.tensors import Shape

# Of each weight, this corner tells two blocks apart; it is all that depth alignment reads.
_CORNER_ROWS, _CORNER_COLUMNS = 48, 256
# Relative depth decides between blocks that look equally alike, and nothing else.
_DEPTH_WEIGHT = 1e-3
# From this mean cosine on, an added block is a copy of an old one: by chance, corners have about 0.01.
_COPIED = 0.2


class Named(Protocol):
    """Names by component: a base's or a migration's."""

    @property
    def components(self) -> Mapping[str, Collection[str]]:
        """Component → names of its parameters."""
        ...

    def modules(self, component: str) -> Iterator[str]:
        """Names of the component's modules."""
        ...

    def vectors(self, component: str) -> Iterator[str]:
        """Names of the component's modules whose weight has one dimension: norms."""
        ...


def names_of(named: Named) -> dict[str, tuple[str, ...]]:
    """Module names of a base or migration by component, to un-flatten underscored names by."""
    return {component: tuple(named.modules(component)) for component in named.components}


@dataclass(frozen=True)
class Counterpart:
    """A module's answer in the other base.

    Attributes:
        module: None where there is none.
        how: by name, or by depth alignment.
        reason: why, in plain words.
    """

    module: ModuleRef | None
    how: Literal["name", "depth", "none"]
    reason: str


@dataclass(frozen=True)
class Pairing:
    """Old module → its counterpart, for every module of the components that both bases have.

    Attributes:
        counterparts: as said.
        survivors: module of a removed block → the old base's module of the same role in the nearest block that is
            still there; absent where none is.
        origins: module of an added block → the old base's module that its weights were copied from; absent where
            none looks like it.
    """

    counterparts: Mapping[ModuleRef, Counterpart]
    survivors: Mapping[ModuleRef, ModuleRef] = field(default_factory=dict)
    origins: Mapping[ModuleRef, ModuleRef] = field(default_factory=dict)

    def __getitem__(self, module: ModuleRef) -> Counterpart:
        return self.counterparts[module]


def find_component(base: Named, component: str, paths: Iterable[str]) -> str | None:
    """The base's component in which an adapter's (or other base's) ``component`` lives, or None.

    A single model has no component names of its own: then the modules' names decide.
    """
    if component in base.components:
        return component
    if component != MODEL and set(base.components) != {MODEL}:
        return None
    paths = list(paths)
    best, most = None, 0
    for name in base.components:
        there = {*base.modules(name), *base.vectors(name)}
        found = sum(path is not None for path in resolve_names(paths, there).values())
        if found > most:
            best, most = name, found
    # Fewer than half of the names: another model that happens to share a few.
    return best if 2 * most >= len(paths) else None


def pair_bases(old: Base, new: Base) -> Pairing:
    """Pair every module of ``old`` with one of ``new``; weights are read only where depths differ."""
    counterparts: dict[ModuleRef, Counterpart] = {}
    survivors: dict[ModuleRef, ModuleRef] = {}
    origins: dict[ModuleRef, ModuleRef] = {}
    for component in old.components:
        paths = list(old.modules(component))
        target = find_component(new, component, paths)
        if target is None:
            missing = Counterpart(None, "none", f"the new base has no {component}")
            counterparts.update({ModuleRef(component, path): missing for path in paths})
            continue
        rename = _renaming(resolve_names(paths, set(new.modules(target))))
        stacks = _Stacks(old, component, new, target, rename)
        for path in paths:
            module = ModuleRef(component, path)
            counterparts[module] = stacks.counterpart(path)
            if counterparts[module].module is None and (survivor := stacks.survivor(path)) is not None:
                survivors[module] = survivor
        answered = {answer.module for answer in counterparts.values()}
        for name in new.modules(target):
            module = ModuleRef(target, name)
            if module not in answered and (origin := stacks.origin(name)) is not None:
                origins[module] = origin
    return Pairing(counterparts, survivors, origins)


def _renaming(resolved: Mapping[str, str | None]) -> Callable[[str], str]:
    """The change of prefix that the matched names show, applied to the unmatched ones too."""
    for old, new in resolved.items():
        if new is None or new == old:
            continue
        if new.endswith(f".{old}"):
            prefix = new.removesuffix(old)
            return lambda path: resolved.get(path) or prefix + path
        if old.endswith(f".{new}"):
            prefix = old.removesuffix(new)
            return lambda path: resolved.get(path) or path.removeprefix(prefix)
    return lambda path: resolved.get(path) or path


class _Stacks:
    """Numbered containers (``layers``, ``down_blocks``, …) of two bases, aligned from the outside in."""

    def __init__(self, old: Base, component: str, new: Base, target: str, rename: Callable[[str], str]) -> None:
        self.old, self.component, self.new, self.target = old, component, new, target
        # Both sides in the new base's spelling: old name by renamed name.
        self.renamed = {path: rename(path) for path in old.modules(component)}
        self.old_names = {name: path for path, name in self.renamed.items()}
        self.new_names = set(new.modules(target))
        self.aligned: dict[str, dict[int, int]] = {}
        self.depths: dict[str, tuple[int, int]] = {}
        self.alike: dict[str, dict[int, int]] = {}

    def counterpart(self, path: str) -> Counterpart:
        here, there, how = "", "", "name"
        for part in self.renamed[path].split("."):
            if not part.isdigit():
                here, there = f"{here}{part}.", f"{there}{part}."
                continue
            index = self._align(here, there).get(int(part))
            if index is None:
                depth_old, depth_new = self.depths[here]
                what = f"{here}{part}"
                return Counterpart(
                    None, "none", f"{what} has no counterpart: {depth_old} blocks there, {depth_new} in the new base"
                )
            if self.depths[here][0] != self.depths[here][1]:
                how = "depth"
            here, there = f"{here}{part}.", f"{there}{index}."
        name = there.rstrip(".")
        if name not in self.new_names:
            return Counterpart(None, "none", "the new base has no such module")
        reason = "same name" if how == "name" else f"by depth: {name}"
        return Counterpart(ModuleRef(self.target, name), "depth" if how == "depth" else "name", reason)

    def survivor(self, path: str) -> ModuleRef | None:
        """The old module of the same role in the nearest block that the new base kept, of a removed block's module."""
        here, there = "", ""
        for part in self.renamed[path].split("."):
            if not part.isdigit():
                here, there = f"{here}{part}.", f"{there}{part}."
                continue
            kept = self._align(here, there)
            if not kept:
                return None
            # Of two neighbours as near, the one before: what it writes passes all that the removed block's write did.
            nearest = min(kept, key=lambda index: (abs(index - int(part)), index))
            here, there = f"{here}{nearest}.", f"{there}{kept[nearest]}."
        old = self.old_names.get(here.rstrip("."))
        if old is None or old == path or there.rstrip(".") not in self.new_names:
            return None
        one, other = ModuleRef(self.component, path), ModuleRef(self.component, old)
        return other if self.old.shape(one) == self.old.shape(other) else None

    def origin(self, name: str) -> ModuleRef | None:
        """The old module that a module of an added block was copied from."""
        here, there = "", ""
        for part in name.split("."):
            if not part.isdigit():
                here, there = f"{here}{part}.", f"{there}{part}."
                continue
            back = {new: old for old, new in self._align(here, there).items()}
            index = back.get(int(part), self.alike.get(here, {}).get(int(part)))
            if index is None:
                return None
            here, there = f"{here}{index}.", f"{there}{part}."
        old = self.old_names.get(here.rstrip("."))
        return None if old is None else ModuleRef(self.component, old)

    def _align(self, here: str, there: str) -> dict[int, int]:
        if here not in self.aligned:
            olds, news = _indices(self.old_names, here), _indices(self.new_names, there)
            self.depths[here] = len(olds), len(news)
            if olds == news or not olds or not news:
                self.aligned[here] = {i: i for i in olds if i in news}
            else:
                scores = self._scores(here, olds, there, news)
                self.aligned[here] = {olds[i]: news[j] for i, j in monotone_alignment(scores)}
                best, at = scores.max(dim=0)
                self.alike[here] = {news[j]: olds[int(at[j])] for j in range(len(news)) if best[j] >= _COPIED}
        return self.aligned[here]

    def _scores(self, here: str, olds: list[int], there: str, news: list[int]) -> Tensor:
        """Similarity of every old block to every new one, (old depth, new depth)."""
        roles = _roles(self.old_names, f"{here}{olds[0]}.")
        total = torch.zeros(len(olds), len(news))
        for role in roles:
            left = [self._module(self.component, self.old_names.get(f"{here}{index}.{role}")) for index in olds]
            names = [f"{there}{index}.{role}" for index in news]
            right = [self._module(self.target, name if name in self.new_names else None) for name in names]
            total += _similarities(self.old, left, self.new, right)
        depth_old = torch.linspace(0, 1, len(olds))[:, None]
        depth_new = torch.linspace(0, 1, len(news))[None, :]
        return total / max(1, len(roles)) - _DEPTH_WEIGHT * (depth_old - depth_new).abs()

    @staticmethod
    def _module(component: str, path: str | None) -> ModuleRef | None:
        return None if path is None else ModuleRef(component, path)


def _similarities(old: Base, left: list[ModuleRef | None], new: Base, right: list[ModuleRef | None]) -> Tensor:
    """Cosine of every two weights' corners, (left, right); 0 where their shapes differ: those say nothing.

    A resized weight has other coordinates, though its corner may have the same shape.
    """
    shapes_old = [None if ref is None else old.shape(ref) for ref in left]
    shapes_new = [None if ref is None else new.shape(ref) for ref in right]

    def corner(base: Base, ref: ModuleRef | None, others: Collection[Shape | None]) -> Tensor | None:
        if ref is None or base.shape(ref) not in others:
            return None
        part = base.corner(ref, _CORNER_ROWS, _CORNER_COLUMNS)
        return torch.nn.functional.normalize(part.float().flatten(), dim=0)

    corners_old = [corner(old, ref, shapes_new) for ref in left]
    corners_new = [corner(new, ref, shapes_old) for ref in right]
    scores = torch.zeros(len(left), len(right))
    for i, a in enumerate(corners_old):
        for j, b in enumerate(corners_new):
            if a is not None and b is not None and shapes_old[i] == shapes_new[j]:
                scores[i, j] = a @ b
    return scores


def _indices(names: Iterable[str], prefix: str) -> list[int]:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return sorted({int(found.group(1)) for name in names if (found := pattern.match(f"{name}."))})


def _roles(names: Iterable[str], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def monotone_alignment(scores: Tensor) -> list[tuple[int, int]]:
    """The order-preserving one-to-one match of rows and columns with the highest sum; the shorter side whole.

    Args:
        scores: (old depth, new depth).
    """
    if scores.shape[0] > scores.shape[1]:
        return [(i, j) for j, i in monotone_alignment(scores.T)]
    n, m = scores.shape
    best = torch.full((n + 1, m + 1), float("-inf"))
    best[0] = 0.0
    for i in range(1, n + 1):
        for j in range(i, m + 1):
            best[i, j] = max(best[i, j - 1], best[i - 1, j - 1] + scores[i - 1, j - 1])
    pairs, i, j = [], n, m
    while i > 0:
        if j > i and best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            pairs.append((i - 1, j - 1))
            i, j = i - 1, j - 1
    return pairs[::-1]
