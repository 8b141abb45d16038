"""Parameters that an adapter stores whole (a trained head, norms, biases): what becomes of each on the new base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.base import Base
from regraft.migration import Migration
from regraft.moves import Move, move_of
from regraft.names import resolve_names
from regraft.pairing import Pairing, find_component, pair_bases
from regraft.tensors import InMemory, TensorRef
from regraft.updates import Diff, Full, SpectralShift, Update
from regraft.widening import widens


@dataclass(frozen=True)
class Whole:
    """The fate of one whole parameter.

    Attributes:
        fate: ``own`` (no base has it: it goes along as it is), ``change`` (its change is put on the new base's),
            ``skip`` (its block has no counterpart), ``problem``.
        reason: why, in plain words.
        target: its name on the new base, as the adapter spells names.
        before: the old base's value, for a change.
        after: the new base's value, for a change.
        move: what takes the change to the new base; None where it is copied.
        place: ``target`` as the new base itself spells names; None where no base has it.
    """

    fate: Literal["own", "change", "skip", "problem"]
    reason: str
    target: ModuleRef | None = None
    before: TensorRef | None = None
    after: TensorRef | None = None
    move: Move | None = None
    place: ModuleRef | None = None


def plan_wholes(
    adapter: Adapter,
    migration: Migration,
    old: Base | None,
    new: Base | None,
    vectors: Mapping[ModuleRef, ModuleRef] = MappingProxyType({}),
) -> dict[ModuleRef, Whole]:
    """Decide for every `Full` and `Diff` update and every shift of a norm, from headers.

    Args:
        adapter: any.
        migration: knows the old base's parameters by name.
        old: without both bases, a change can't be carried.
        new: likewise.
        vectors: the adapter's modules that shift a norm's weight → that weight in the old base.
    """
    wholes: dict[ModuleRef, Whole] = {}
    some = bool(vectors) or _has_wholes(adapter)
    pairing = pair_bases(old, new) if old is not None and new is not None and some else None
    for shift, vector in vectors.items():
        wholes[shift] = _shift(shift, adapter.updates[shift], vector, migration, old, new, pairing)
    for component, updates in adapter.components().items():
        paths = [path for path, update in updates.items() if isinstance(update, Full | Diff)]
        if not paths:
            continue
        # Without an old base, the migration knows the names of the new one.
        known = migration.parameters
        home = home_of(migration, component, updates)
        names = set(known.get(home or component, ()))
        stems = {name.rpartition(".")[0] for name in names}
        found = resolve_names(paths, names)
        parents = resolve_names({path.rpartition(".")[0] for path in paths}, stems)
        for path in paths:
            ref, update, place = ModuleRef(component, path), updates[path], found[path]
            at = ModuleRef(home or component, place or "")
            if place is not None and isinstance(update, Diff):
                wholes[ref] = _difference(ref, update, at, migration, old, new, pairing)
            elif place is not None and isinstance(update, Full):
                wholes[ref] = _change(ref, update, at, migration, old, new, pairing)
            elif isinstance(update, Diff) or parents.get(path.rpartition(".")[0]) is not None:
                reason = "matches no parameter of the base, and its module is not the adapter's own"
                wholes[ref] = Whole("problem", reason)
            else:
                wholes[ref] = Whole("own", "a parameter of the adapter's own, carried as it is", ref)
    return wholes


def home_of(migration: Migration, component: str, updates: Mapping[str, Update]) -> str | None:
    """The migration's component in which an adapter's lives, or None; names tell that of whole parameters alone."""
    known = migration.parameters
    if any(not update.by_parameter for update in updates.values()):
        return find_component(migration, component, [p for p, update in updates.items() if not update.by_parameter])
    if component in known:
        return component
    if component != MODEL and set(known) != {MODEL}:
        return None
    found = {
        name: sum(place is not None for place in resolve_names(updates, set(names)).values())
        for name, names in known.items()
    }
    best = max(found, key=lambda name: found[name], default=None)
    return best if best is not None and 2 * found[best] >= len(updates) else None


def _has_wholes(adapter: Adapter) -> bool:
    return any(update.by_parameter for update in adapter.updates.values())


def _change(
    ref: ModuleRef,
    update: Full,
    home: ModuleRef,
    migration: Migration,
    old: Base | None,
    new: Base | None,
    pairing: Pairing | None,
) -> Whole:
    if old is None or new is None or pairing is None:
        return Whole("problem", "is stored whole and carried as its change, which takes both bases (--from and --to)")
    before = old.parameter(home)
    move = move_of(home, before.shape, migration) if before is not None else None
    target = _target(home, migration, new, pairing, move)
    if isinstance(target, str):
        return Whole("skip", target)
    after = new.parameter(target)
    if before is None or after is None:
        return Whole("skip", "the new base has no such parameter")
    rows = update.shape[0] if update.shape else 0
    # More rows than the bases have are added tokens: these are the adapter's own.
    longer = before.shape[1:] == update.shape[1:] and update.shape[:1] > before.shape[:1]
    moved = before.shape if move is None else move.shape(before.shape)
    if moved != after.shape or not (update.shape == before.shape or longer):
        shapes = f"{tuple(update.shape)} in the adapter, {tuple(before.shape)} and {tuple(after.shape)} in the bases"
        return Whole("problem", f"is stored whole, and its shapes differ: {shapes}")
    reason = "its change from the old base, on the new one" + ("" if move is None else f": {move.reason}")
    if longer:
        turned = move is not None and move.transport is not None
        reason += f"; {rows - before.shape[0]} added rows {'by the map of the width' if turned else 'as they are'}"
    return Whole("change", reason, respelled(ref, target), before, after, move, target)


def _shift(
    ref: ModuleRef,
    update: Update,
    home: ModuleRef,
    migration: Migration,
    old: Base | None,
    new: Base | None,
    pairing: Pairing | None,
) -> Whole:
    """A shift of a norm's weight is carried as the change that it makes of it, as one that is stored."""
    if old is None:
        return Whole("problem", f"is a {update.kind}, whose change depends on the old base's weight: give --from too")
    before = old.parameter(home)
    if before is None or not update.fits(before.shape):
        have = "no such weight" if before is None else f"{tuple(before.shape)}"
        return Whole("problem", f"changes {tuple(update.shape)}, the base's weight is {have}")
    return _difference(ref, update.shaped(before.shape), home, migration, old, new, pairing)


def _difference(
    ref: ModuleRef,
    update: Update,
    home: ModuleRef,
    migration: Migration,
    old: Base | None,
    new: Base | None,
    pairing: Pairing | None,
) -> Whole:
    """A stored change needs no base's values: it goes along as it is, or by the maps of its module."""
    move = move_of(home, update.shape, migration)
    target = _target(home, migration, new, pairing, move)
    entry = migration.entries.get(ModuleRef(home.component, home.path.removesuffix(".weight")))
    if isinstance(target, str) and entry is not None and entry.target is not None:
        # A removed block's, which goes where the policy takes its module.
        target = ModuleRef(entry.target.component, f"{entry.target.path}.weight")
    if isinstance(target, str):
        return Whole("skip", target)
    before = old.parameter(home) if old is not None else None
    after = new.parameter(target) if new is not None else None
    moves = move is not None and (move.transport is not None or move.units is not None)
    wide = not moves and after is not None and widens(update.shape, after.shape)
    if before is not None and not update.fits(before.shape):
        return Whole("problem", f"changes {list(update.shape)}, a base's parameter is {list(before.shape)}")
    moved = update.shape if move is None else move.shape(update.shape)
    fits = after is None or wide or (moved == after.shape if moves else update.fits(after.shape))
    if after is not None and not fits:
        return Whole("problem", f"changes {list(moved)}, a base's parameter is {list(after.shape)}")
    reason = "its change, as it is" if move is None else move.reason
    reason += "; the inputs that the new base added stay its own" if wide else ""
    return Whole("change", reason, respelled(ref, target), before, after, move, target)


def _target(
    home: ModuleRef, migration: Migration, new: Base | None, pairing: Pairing | None, move: Move | None
) -> ModuleRef | str:
    """The parameter's name on the new base, or why it has none."""
    if move is not None and move.target is not None:
        return move.target
    answers = {module: (entry.target, entry.reason) for module, entry in migration.entries.items()}
    if pairing is not None:
        answers = {module: (answer.module, answer.reason) for module, answer in pairing.counterparts.items()}
    return _counterpart(home, answers, new)


def _counterpart(
    home: ModuleRef, answers: Mapping[ModuleRef, tuple[ModuleRef | None, str]], new: Base | None
) -> ModuleRef | str:
    """The parameter's name on the new base, or why it has none: it goes where its block goes.

    Args:
        home: its name on the old base.
        answers: the old base's modules → those of the new base, or None and why.
        new: to look for parameters outside of blocks; without it they keep their names.
    """
    stem, _, last = home.path.rpartition(".")
    block = _block(home.path)
    exact = answers.get(ModuleRef(home.component, stem))
    if exact is not None:
        module, reason = exact
        return reason if module is None else ModuleRef(module.component, f"{module.path}.{last}")
    for there, (module, reason) in answers.items():
        if there.component == home.component and block and there.path.startswith(block):
            return reason if module is None else ModuleRef(module.component, respelled(home, module).path)
    component = next((module.component for module, _ in answers.values() if module), home.component)
    if new is None:
        return ModuleRef(component, home.path)
    place = resolve_names([home.path], set(new.components.get(component, ()))).get(home.path)
    return ModuleRef(component, place) if place is not None else "the new base has no such parameter"


def _block(path: str) -> str:
    """The path up to and with its last block number, or nothing."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1]) + "." if last >= 0 else ""


def respelled(ref: ModuleRef, target: ModuleRef) -> ModuleRef:
    """The target's name as ``ref`` spells names: its own words, the target's block numbers."""
    numbers = iter([part for part in target.path.split(".") if part.isdigit()])
    parts = [next(numbers, part) if part.isdigit() else part for part in ref.path.split(".")]
    return ModuleRef(ref.component, ".".join(parts))


def changed(update: Full, whole: Whole, strength: float) -> Full:
    """The new base's value with the adapter's change: W_new + strength · M(value − W_old).

    Added rows have no old value: they are as they are, or moved by the map of the width.
    """
    assert whole.before is not None
    assert whole.after is not None
    start, end, value = whole.before.load(), whole.after.load(), update.value.load()
    if torch.equal(start, end) and strength == 1.0 and whole.move is None:
        return update
    rows = start.shape[0] if start.dim() else None
    change = value[:rows].float() - start.float()
    carried = end.float() + strength * (change if whole.move is None else whole.move(change))
    added = value[rows:].float() if rows is not None else value[:0]
    if len(added):
        turned = whole.move.transport if whole.move is not None else None
        added = added if turned is None or not turned.rotates else turned.terms[0][1].on_the_right(added)
        carried = torch.cat([carried, added])
    return update.with_value(carried)


def shifted(update: SpectralShift, whole: Whole, strength: float) -> tuple[ModuleRef, Update, str]:
    """A shift of a norm's weight on the new base: the change that it makes of the old one's.

    Where the weight is the same in both, it is the shift itself.

    Returns:
        The module, or the name of the whole weight; the update there; what was made of it, for the report.
    """
    assert whole.before is not None
    assert whole.target is not None
    before = whole.before.load()
    stays = strength == 1.0 and whole.move is None and whole.after is not None
    if stays and whole.after is not None and torch.equal(before, whole.after.load()):
        return whole.target, update, "the same weight in both bases"
    change = update.scaled(strength).delta(before)
    if whole.move is not None:
        change = whole.move(change)
    value = InMemory(change.to(update.shift.dtype).contiguous())
    name = ModuleRef(whole.target.component, f"{whole.target.path}.weight")
    how = f"{whole.reason}; a {update.kind} converted: its change of the old norm's weight"
    return name, Diff(value, f"{whole.target.path}.w_norm"), how
