"""What will happen to each module of an adapter, decided from headers before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import Refused
from regraft.families import family_of_base
from regraft.names import resolve_names
from regraft.pairing import Named, find_component
from regraft.tensors import Shape
from regraft.updates import Full, Update


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
    """An adapter's modules in a base's own names.

    Attributes:
        modules: adapter's module → base's module.
        missing: adapter's module → why the base has nothing for it, where a whole component is absent.
        unknown: adapter's modules that match nothing in a component that is there.
        new_parameters: `Full` updates of parameters that the base does not have (a trained head).
    """

    modules: Mapping[ModuleRef, ModuleRef]
    missing: Mapping[ModuleRef, str] = field(default_factory=dict)
    unknown: tuple[ModuleRef, ...] = ()
    new_parameters: tuple[ModuleRef, ...] = ()


def locate(adapter: Adapter, base: Named, which: str) -> Located:
    """Find the adapter's modules in a base or migration, from headers.

    Args:
        adapter: any.
        base: old or new.
        which: "old" or "new", for the reasons.
    """
    modules: dict[ModuleRef, ModuleRef] = {}
    missing: dict[ModuleRef, str] = {}
    unknown: list[ModuleRef] = []
    fresh: list[ModuleRef] = []
    for component, updates in adapter.components().items():
        weights = [path for path, update in updates.items() if not isinstance(update, Full)]
        home = find_component(base, component, weights or [path.rpartition(".")[0] for path in updates])
        if home is None:
            missing.update({ModuleRef(component, path): f"the {which} base has no {component}" for path in updates})
            continue
        found = resolve_names(weights, set(base.modules(home)))
        found |= resolve_names([p for p, u in updates.items() if isinstance(u, Full)], set(base.components[home]))
        # A whole parameter of a module that the base has, but of a name that it lacks, is no trained head.
        stems = {path.rpartition(".")[0] for path, update in updates.items() if isinstance(update, Full)}
        parents = {stem for stem, place in resolve_names(stems, set(base.modules(home))).items() if place is not None}
        for path, update in updates.items():
            ref, target = ModuleRef(component, path), found[path]
            if target is not None:
                modules[ref] = ModuleRef(home, target)
            elif isinstance(update, Full) and path.rpartition(".")[0] not in parents:
                fresh.append(ref)
            else:
                unknown.append(ref)
    return Located(modules, missing, tuple(unknown), tuple(fresh))


def source_modules(adapter: Adapter, old: Base) -> dict[ModuleRef, Update]:
    """The old base's modules that the adapter changes → its update, without whole parameters."""
    located = locate(adapter, old, "old")
    return {
        located.modules[ref]: update
        for ref, update in adapter.updates.items()
        if ref in located.modules and not isinstance(update, Full)
    }


def same_matrix(a: Shape, b: Shape) -> bool:
    """Whether two shapes are one matrix: a 1 × 1 convolution is a linear layer."""
    return a == b or (a[:2] == b[:2] and prod(a) == prod(b) == a[0] * a[1])


def check_families(adapter: Adapter, old: Base | None, new: Base) -> None:
    """Refuse an adapter that was made for another family than its old base.

    Raises:
        Refused: fewer than half of the adapter's modules fit the old base; both families are named.
    """
    base, which = (old, "old") if old is not None else (new, "new")
    located = locate(adapter, base, which)
    fitting = [
        ref
        for ref, home in located.modules.items()
        if isinstance(adapter.updates[ref], Full) or same_matrix(adapter.updates[ref].shape, base.shape(home))
    ]
    # A few names and shapes are common to many families; half of them are not.
    if 2 * len(fitting) >= len(adapter.updates) - len(located.missing) - len(located.new_parameters) and fitting:
        return
    made_for, is_ = adapter.family or "an unknown family", family_of_base(base) or "an unknown family"
    some = str(next(iter(adapter.updates)))
    raise Refused(
        f"the adapter is for {made_for}, the {which} base is {is_}: most of the adapter's modules do not fit it",
        file=adapter.path,
        key=some,
        remedy="Give the base that it was trained on."
        if old is not None
        else "Give a base of its family, or --from too.",
    )
