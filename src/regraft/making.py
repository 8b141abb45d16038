"""What a method that depends on the adapter makes of it, once a port has been planned and not refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.carry import Carrier, Settings
from regraft.errors import UsageError
from regraft.joining import joined
from regraft.methods import Carried, Fit, methods
from regraft.methods.task import AdapterTask
from regraft.migration import Migration
from regraft.names import resolve_names
from regraft.pairing import pair_bases
from regraft.prepare import Preparation
from regraft.updates import Update

Ticker = Callable[[int, int, str], None]


def make_for(
    adapter: Adapter, ready: Preparation, settings: Settings, old: Base | None, new: Base | None, tick: Ticker | None
) -> Carried | str | None:
    """What the migration's method makes of this adapter, where it depends on one.

    Returns:
        What it carried; or why it left the migration's own transports as they are; or None, where the method does not
        look at the adapter.

    Raises:
        UsageError: the method runs both bases, and one was not given.
        InputError, RegraftError: a base can't be run.
    """
    migration = ready.migration
    # A composed migration was made by no method of its own.
    method = methods().get(migration.method)
    if method is None:
        return None
    if method.per == "adapter":
        if old is None or new is None:
            raise UsageError(f"method {method.name!r} looks at both bases", remedy="Give --from and --to.")
        made: Carried = method.function(task_for(adapter, ready, settings, old, new, tick), **own_options(migration))
        return made
    fitted_now = migration.file is None and migration.digest is None
    if method.after is None or old is None or new is None or not fitted_now:
        return None
    task = task_for(adapter, ready, settings, old, new, tick)
    return method.after(task, Fit({}, migration.used, migration.reason))


def own_options(migration: Migration) -> dict[str, Any]:
    """The options of the migration's method, without that for removed blocks, which every method has."""
    return {name: value for name, value in migration.options.items() if name != "removed"}


def task_for(
    adapter: Adapter, ready: Preparation, settings: Settings, old: Base, new: Base, tick: Ticker | None
) -> AdapterTask:
    """The task of a planned port."""
    lost = {ref for ref in adapter.updates if ref in ready.left_out or str(ref) in ready.problems}
    chosen = replace(adapter, updates={ref: update for ref, update in adapter.updates.items() if ref not in lost})
    task = AdapterTask(
        chosen,
        old,
        new,
        pair_bases(old, new),
        {home: chosen.updates[ref] for ref, home in ready.located.modules.items() if ref in chosen.updates},
        lambda: _copy(chosen, ready, old, new),
        settings.running,
        settings.rank,
        similarity=ready.judgement.similarity,
        distance=ready.judgement.distance,
    )
    return task if tick is None else replace(task, tick=tick)


def _copy(adapter: Adapter, ready: Preparation, old: Base, new: Base) -> Adapter:
    """What the migration makes of it, by the new base's names; what has no place there is left out."""
    carrier = Carrier(adapter, ready, Settings(), old, new)
    landed: dict[ModuleRef, list[Update]] = {}
    for ref, update in adapter.updates.items():
        _, target, moved = carrier.carry(ref, update)
        if target is None or moved is None:
            continue
        place = _place(ref, ready) or target
        if not moved.by_parameter and ref in ready.wholes:
            # A shift of a norm that has not moved: it stays one of its module.
            place = ModuleRef(place.component, place.path.removesuffix(".weight"))
        landed.setdefault(place, []).append(moved)
        entry = ready.migration.entries.get(ready.located.modules.get(ref, ref))
        for copy, (_, part) in zip(entry.copies if entry is not None else (), carrier.copies(ref, update), strict=True):
            assert copy.target is not None
            landed.setdefault(copy.target, []).append(part)
    # Whole: what meets is not cut before the method has seen it.
    carried, _ = joined(landed, [], 1.0, adapter.path)
    return replace(adapter, updates=_by_base(carried, new))


def _place(ref: ModuleRef, ready: Preparation) -> ModuleRef | None:
    """What a module or whole parameter of the adapter answers to in the new base, by its own component and name."""
    if ref in ready.wholes:
        return ready.wholes[ref].place
    home = ready.located.modules.get(ref)
    entry = ready.migration.entries.get(home) if home is not None else None
    return entry.target if entry is not None else None


def _by_base(updates: dict[ModuleRef, Update], new: Base) -> dict[ModuleRef, Update]:
    """Whole parameters by the new base's own names, too."""
    named: dict[ModuleRef, Update] = {}
    for component in {ref.component for ref in updates}:
        here = {ref.path: update for ref, update in updates.items() if ref.component == component}
        whole = [path for path, update in here.items() if update.by_parameter]
        there = resolve_names(whole, set(new.components.get(component, ())))
        named |= {ModuleRef(component, there.get(path) or path): update for path, update in here.items()}
    return named
