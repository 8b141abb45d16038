"""What is decided before an update is carried: the plan that ``--dry-run`` prints and the real run follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.forecast import Evidence, Judgement, judge
from regraft.migration import Migration
from regraft.plan import Located, Selection, locate, same_matrix
from regraft.updates import Full, LowRank


@dataclass(frozen=True)
class Preparation:
    """What becomes of each module of one adapter.

    Attributes:
        migration: fitted, or read.
        located: the adapter's modules in the migration's names.
        evidence: how near the bases are, by the adapter's names.
        judgement: the verdict.
        problems: the adapter's modules and keys that are not understood → why.
        left_out: modules that the user's selection leaves out → which option.
    """

    migration: Migration
    located: Located
    evidence: Evidence
    judgement: Judgement
    problems: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[ModuleRef, str] = field(default_factory=dict)


def prepare(
    adapter: Adapter, migration: Migration, selection: Selection = Selection(), new: Base | None = None
) -> Preparation:
    """Decide what becomes of each module; reads the updates' norms, no weight of a base.

    Args:
        adapter: as it was read.
        migration: for its bases.
        selection: which of its modules.
        new: the new base, by which whole parameters are known (a migration knows modules only).
    """
    which = "old" if migration.source is not None else "new"
    located = locate(adapter, migration, which)
    left_out = {ref: why for ref in adapter.updates if (why := selection.left_out(ref)) is not None}
    squares = {
        ref: update.norm() ** 2
        for ref, update in adapter.updates.items()
        if isinstance(update, LowRank) and ref not in left_out
    }
    total = sum(squares.values())
    shares = {ref: square / total if total > 0 else 0.0 for ref, square in squares.items()}
    skipped = dict(located.missing)
    nearness, problems = {}, dict.fromkeys(adapter.unrecognised, "is not understood by the format's reader")
    for ref in located.unknown:
        if not isinstance(adapter.updates[ref], Full):
            problems[str(ref)] = f"matches no module of the {which} base"
    for ref in locate(adapter, new, "new").unknown if new is not None else ():
        if isinstance(adapter.updates[ref], Full):
            problems[str(ref)] = "matches no parameter of the new base, and is no module of the adapter's own"
    for ref, home in located.modules.items():
        update, entry = adapter.updates[ref], migration.entries.get(home)
        if isinstance(update, Full) or entry is None:
            continue
        if not same_matrix(update.shape, entry.shape_old):
            problems[str(ref)] = f"changes {tuple(update.shape)}, the base's weight is {tuple(entry.shape_old)}"
        elif entry.transport is None:
            skipped[ref] = entry.reason
        if migration.source is not None and entry.target is not None:
            nearness[ref] = entry.nearness
    chosen = {ref: why for ref, why in skipped.items() if ref in shares}
    evidence = Evidence(shares, {ref: near for ref, near in nearness.items() if ref in shares}, chosen)
    return Preparation(migration, located, evidence, judge(adapter, migration, evidence), problems, left_out)
