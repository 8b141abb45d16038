"""What will happen to each module of an adapter, decided from headers before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import InputError, Refused
from regraft.families import family_of_base
from regraft.names import resolve_names
from regraft.pairing import Named, find_component
from regraft.residual import check_whole
from regraft.tensors import Shape
from regraft.updates import ByShape, SpectralShift, Update, with_shapes

if TYPE_CHECKING:
    from regraft.migration import Migration


@dataclass(frozen=True)
class Selection:
    """What of the adapter the user wants carried.

    Attributes:
        include: globs over ``component.module``; empty for all.
        exclude: globs that leave modules out.
        components: component names; empty for all.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    components: tuple[str, ...] = ()

    def of(self, adapter: Adapter) -> Adapter:
        """The adapter without what is left out."""
        kept = {ref: update for ref, update in adapter.updates.items() if self.left_out(ref) is None}
        return replace(adapter, updates=kept)

    def left_out(self, module: ModuleRef) -> str | None:
        """Why the user's choice leaves this module out, or None."""
        name = f"{module.component}.{module.path}"

        def hit(globs: tuple[str, ...]) -> bool:
            return any(fnmatchcase(name, glob) or fnmatchcase(module.path, glob) for glob in globs)

        if self.components and module.component not in self.components:
            return "left out by --components"
        if self.include and not hit(self.include):
            return "left out by --include"
        return "left out by --exclude" if hit(self.exclude) else None


@dataclass(frozen=True)
class Located:
    """An adapter's modules in a base's own names. Parameters stored whole are another matter: `regraft.wholes`.

    Attributes:
        modules: adapter's module → base's module.
        vectors: adapter's module that shifts a weight of one dimension (SVDiff on a norm) → that weight in the base.
        missing: everything of a component that the base lacks → that reason.
        unknown: adapter's modules that match nothing in a component that is there.
    """

    modules: Mapping[ModuleRef, ModuleRef]
    vectors: Mapping[ModuleRef, ModuleRef] = field(default_factory=dict)
    missing: Mapping[ModuleRef, str] = field(default_factory=dict)
    unknown: tuple[ModuleRef, ...] = ()


def locate(adapter: Adapter, base: Named, which: str) -> Located:
    """Find the adapter's modules in a base or migration, from headers.

    Args:
        adapter: any.
        base: old or new.
        which: "old" or "new", for the reasons.
    """
    modules: dict[ModuleRef, ModuleRef] = {}
    vectors: dict[ModuleRef, ModuleRef] = {}
    missing: dict[ModuleRef, str] = {}
    unknown: list[ModuleRef] = []
    for component, updates in adapter.components().items():
        paths = [path for path, update in updates.items() if not update.by_parameter]
        home = find_component(base, component, paths or [path.rpartition(".")[0] for path in updates])
        if home is None:
            missing.update({ModuleRef(component, path): f"the {which} base has no {component}" for path in updates})
            continue
        norms = set(base.vectors(home)) if any(isinstance(u, SpectralShift) for u in updates.values()) else set()
        for path, target in resolve_names(paths, {*base.modules(home), *norms}).items():
            ref = ModuleRef(component, path)
            if target is None or (target in norms and not isinstance(updates[path], SpectralShift)):
                unknown.append(ref)
            elif target in norms:
                vectors[ref] = ModuleRef(home, f"{target}.weight")
            else:
                modules[ref] = ModuleRef(home, target)
    return Located(modules, vectors, missing, tuple(unknown))


def with_shapes_of(adapter: Adapter, migration: Migration, old: Base | None) -> Adapter:
    """The adapter, its updates told the shapes of the old base's weights; see `regraft.updates.with_shapes`.

    Args:
        adapter: as it was read.
        migration: knows the shapes of the modules that it was fitted for.
        old: knows those of all.
    """
    if not any(isinstance(update, ByShape) for update in adapter.updates.values()):
        return adapter
    homes = locate(adapter, migration if old is None else old, "old").modules
    shapes = {ref: _shape_of(home, migration, old) for ref, home in homes.items()}
    return replace(adapter, updates=with_shapes(adapter.updates, {r: s for r, s in shapes.items() if s is not None}))


def _shape_of(home: ModuleRef, migration: Migration, old: Base | None) -> Shape | None:
    if old is not None:
        return old.shape(home) if f"{home.path}.weight" in old.components[home.component] else None
    return migration.entries[home].shape_old if home in migration.entries else None


def count_fits(adapter: Adapter, base: Base, located: Located) -> int:
    """How many of an adapter's modules have a weight of their shape in a base.

    Args:
        adapter: any.
        base: any.
        located: the adapter's modules there.
    """
    weights = {ref: ModuleRef(home.component, f"{home.path}.weight") for ref, home in located.modules.items()}
    found = {ref: base.parameter(place) for ref, place in {**weights, **located.vectors}.items()}
    return sum(there is not None and adapter.updates[ref].fits(there.shape) for ref, there in found.items())


def source_modules(adapter: Adapter, old: Base) -> dict[ModuleRef, Update]:
    """The old base's modules that the adapter changes → its update; of whole parameters, those that are weights."""
    named = locate(adapter, old, "old").modules
    return {home: adapter.updates[ref] for ref, home in {**weights_of_wholes(adapter, old), **named}.items()}


def weights_of_wholes(adapter: Adapter, base: Base) -> dict[ModuleRef, ModuleRef]:
    """The adapter's whole parameters that are weights of a base's modules → these modules, by the base's names."""
    found: dict[ModuleRef, ModuleRef] = {}
    for component, updates in adapter.components().items():
        stems = {
            path.removesuffix(".weight"): path
            for path, update in updates.items()
            if update.by_parameter and path.endswith(".weight") and len(update.shape) > 1
        }
        others = [path for path, update in updates.items() if not update.by_parameter]
        home = find_component(base, component, others or stems) if stems else None
        if home is None:
            continue
        for stem, target in resolve_names(stems, set(base.modules(home))).items():
            if target is not None:
                found[ModuleRef(component, stems[stem])] = ModuleRef(home, target)
    return found


def same_matrix(a: Shape, b: Shape) -> bool:
    """Whether two shapes are one matrix: a 1 × 1 convolution is a linear layer."""
    return a == b or (a[:2] == b[:2] and prod(a) == prod(b) == a[0] * a[1])


def check_families(adapter: Adapter, old: Base | None, new: Base) -> None:
    """Refuse an adapter that was made for another family than its old base.

    Raises:
        InputError: the adapter has no update that regraft understands, or is one of a base that was changed first.
        Refused: fewer than half of the adapter's modules fit the old base; both families are named.
    """
    if adapter.tokens and not adapter.updates and not adapter.unrecognised:
        what = "holds embeddings of added tokens alone: no method maps those"
        remedy = "Bases with the same text encoder take the file as it is."
        raise InputError(what, file=adapter.path, key=str(next(iter(adapter.tokens))), remedy=remedy)
    if not adapter.updates:
        key = adapter.unrecognised[0] if adapter.unrecognised else None
        other = adapter.layout.get("unsupported")
        what = f"this {adapter.format} file has no update of a kind that regraft carries"
        what += f": it is one of {other}" if other else ""
        raise InputError(what, file=adapter.path, key=key, remedy="`regraft inspect` lists what it holds.")
    check_whole(adapter)
    base, which = (old, "old") if old is not None else (new, "new")
    located = locate(adapter, base, which)
    wanted = len(located.modules) + len(located.vectors) + len(located.unknown)
    fits = count_fits(adapter, base, located)
    # A few names and shapes are common to many families; half of them are not.
    if 2 * fits >= wanted and (wanted or not located.missing):
        return
    made_for, is_ = adapter.family or "an unknown family", family_of_base(base) or "an unknown family"
    raise Refused(
        f"the adapter is for {made_for}, the {which} base is {is_}: most of the adapter's modules do not fit it",
        file=adapter.path,
        key=str(next(iter(adapter.updates))),
        remedy="Give the base that it was trained on." if old is not None else "Give a base of its family.",
    )
