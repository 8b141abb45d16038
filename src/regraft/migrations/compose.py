"""Two migrations after each other as one: v1 → v2 and v2 → v3 give v1 → v3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from regraft.errors import InputError, Refused, UsageError
from regraft.migration import Entry, Migration, check_general
from regraft.migrations.algebra import Products
from regraft.migrations.base_id import public_name
from regraft.migrations.maps import in_memory
from regraft.migrations.model import MOST_TERMS
from regraft.nearness import Nearness
from regraft.report.schema import BaseSummary


def compose_all(migrations: Sequence[Migration]) -> Migration:
    """The migrations after each other, the first one first.

    Raises:
        Refused: one does not begin where the one before it ends.
        InputError: a transport would have too many terms.
        UsageError: there are none, or one is narrowed or has modules that share a target or have several.
    """
    if not migrations:
        raise UsageError("there is no migration to compose", remedy="Name two or more.")
    return reduce(compose, migrations)


def compose(first: Migration, second: Migration) -> Migration:
    """``second`` after ``first``, exact: a port through it is the two ports after each other, without their cuts.

    An identity (equal bases, every transport the identity) gives back the other one as it is.

    Raises:
        Refused: ``second`` does not begin where ``first`` ends.
        InputError: a transport would have too many terms.
    """
    _check_meet(first, second)
    for migration in (first, second):
        check_general(migration)
    if _is_identity(first) and set(second.entries) <= _targets(first):
        return second
    if _is_identity(second) and _targets(first) <= set(second.entries):
        return first
    # Products know a shared map by its place in memory.
    first, second = in_memory(first), in_memory(second)
    products = Products()
    entries = {module: _entry(entry, second, products) for module, entry in first.entries.items()}
    used = first.used if first.used == second.used else f"{first.used} + {second.used}"
    via = (*first.via, first.target, *second.via)
    return Migration(
        source=first.source,
        target=second.target,
        method=first.method if first.method == second.method else "compose",
        used=used,
        reason=f"composed of {_steps(first) + _steps(second)} migrations",
        options=dict(first.options) if first.options == second.options and first.used == second.used else {},
        entries=entries,
        parameters=first.parameters,
        base_bytes=second.base_bytes,
        license=first.license if first.license == second.license else _both(first.license, second.license),
        composed=(*first.hashes, *second.hashes),
        via=via,
    )


def _check_meet(first: Migration, second: Migration) -> None:
    if second.source is None:
        raise Refused(
            "names no old base, so nothing tells whether it continues another migration",
            file=second.file,
            remedy="Make it again with both bases.",
        )
    if first.target.fingerprint != second.source.fingerprint:
        raise Refused(
            f"begins at {_named(second.source)}, and the migration before it ends at {_named(first.target)}",
            file=second.file,
            remedy="Give them in order, old to new; `regraft migration show` prints both ends.",
        )


def _named(base: BaseSummary) -> str:
    return f"{public_name(base.path)} ({base.fingerprint})"


def _is_identity(migration: Migration) -> bool:
    return (
        migration.source is not None
        and migration.source.fingerprint == migration.target.fingerprint
        and all(
            entry.transport is not None and entry.transport.is_identity and entry.target == module
            for module, entry in migration.entries.items()
        )
    )


def _targets(migration: Migration) -> set[object]:
    return {entry.target for entry in migration.entries.values() if entry.target is not None}


def _steps(migration: Migration) -> int:
    return len(migration.via) + 1


def _both(first: str | None, second: str | None) -> str | None:
    """The licence of a work made from both, as an SPDX expression; nothing where one of them is not known."""
    return None if first is None or second is None else f"({first}) AND ({second})"


def _entry(entry: Entry, second: Migration, products: Products) -> Entry:
    if entry.transport is None or entry.target is None:
        return entry
    after = second.entries.get(entry.target)
    step = f"on the way to {public_name(second.target.path)}"
    if after is None:
        # A migration of the whole base has every module of it: this one was made for part of it.
        return _lost(entry, f"{step}: the migration has no module {entry.target}", uncovered=True)
    if after.transport is None or after.target is None:
        return _lost(entry, f"{step}: {after.reason}", uncovered=after.uncovered)
    if after.shape_old != entry.shape_new:
        raise InputError(
            f"takes {list(after.shape_old)} where the migration before it gives {list(entry.shape_new or ())}",
            file=second.file,
            key=str(entry.target),
            remedy="One of the two is damaged: get it again.",
        )
    transport = products.transport(after.transport, entry.transport)
    if len(transport.terms) > MOST_TERMS:
        raise InputError(
            f"composed, this module would have {len(transport.terms)} terms; {MOST_TERMS} are allowed",
            file=second.file,
            key=str(entry.target),
            remedy="Make a migration from the first base to the last one with `regraft migration make`.",
        )
    return replace(
        entry,
        target=after.target,
        transport=transport,
        reason=entry.reason if after.reason in ("same name", entry.reason) else _joined(entry.reason, after.reason),
        shape_new=after.shape_new,
        nearness=nearness_over(entry.nearness, after.nearness),
        row_norms=_row_norms(entry, after),
        derived=not (_unmoved(entry) or _unmoved(after)) or entry.derived or after.derived,
    )


def _joined(first: str, second: str) -> str:
    return second if first == "same name" else f"{first}; then {second}"


def _lost(entry: Entry, reason: str, *, uncovered: bool) -> Entry:
    return Entry(None, None, reason, entry.shape_old, nearness=entry.nearness, uncovered=uncovered)


def nearness_over(first: Nearness, second: Nearness) -> Nearness:
    """Over both steps, where no weights are at hand: a bound of the drift, and the similarity that is to be expected.

    ‖C − A‖ ≤ ‖B − A‖ + ‖C − B‖ ≤ d₁‖A‖ + d₂‖B‖ and ‖B‖ ≤ (1 + d₁)‖A‖. Cosines multiply where the second drift has
    nothing to do with the first.
    """
    similarity = distance = None
    if first.similarity is not None and second.similarity is not None:
        similarity = first.similarity * second.similarity
    if first.distance is not None and second.distance is not None:
        distance = first.distance + second.distance * (1 + first.distance)
    return Nearness(similarity, distance)


def _unmoved(entry: Entry) -> bool:
    """Whether the two weights of one step are equal."""
    assert entry.transport is not None
    return entry.nearness.distance == 0.0 and entry.transport.is_identity


def _row_norms(first: Entry, second: Entry) -> Tensor | None:
    if first.row_norms is not None and second.row_norms is not None:
        return torch.stack([first.row_norms[0], second.row_norms[1]])
    # Norms that did not change are not stored; any others are unknown, and so are those of the whole way.
    if _unmoved(first):
        return second.row_norms
    return first.row_norms if _unmoved(second) else None
