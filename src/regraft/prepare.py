"""What is decided before an update is carried: the plan that ``--dry-run`` prints and the real run follows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.changes import takes_old
from regraft.errors import InputError
from regraft.forecast import Evidence, Judgement, Survey, judge
from regraft.forecast.survey import Surveyor, survey
from regraft.migration import Migration
from regraft.pairing import Named
from regraft.plan import Located, Selection, locate, with_shapes_of
from regraft.tensors import InMemory, check_finite
from regraft.tokens import refused_tokens
from regraft.updates import ByShape, LowRank, Update
from regraft.updates.vera import UNDRAWN
from regraft.wholes import Whole, home_of, plan_wholes


@dataclass(frozen=True)
class Preparation:
    """What becomes of each module of one adapter.

    Attributes:
        migration: fitted, or read.
        located: the adapter's selected modules in the migration's names.
        evidence: how near the bases are, by the adapter's names.
        judgement: the verdict.
        wholes: the fate of every parameter that is stored whole.
        problems: the adapter's modules and keys that are not understood → why.
        left_out: modules that the user's selection leaves out → which option.
    """

    migration: Migration
    located: Located
    evidence: Evidence
    judgement: Judgement
    wholes: Mapping[ModuleRef, Whole] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[ModuleRef, str] = field(default_factory=dict)


def check_understood(adapter: Adapter, base: Named, which: str, selection: Selection) -> None:
    """Fail on keys and modules that are not understood, from headers: before anything is fitted.

    Raises:
        InputError: naming the first of them.
    """
    problems = _unknown(adapter, locate(adapter, base, which), which, selection)
    if problems:
        raise not_understood(adapter, problems)


def not_understood(adapter: Adapter, problems: Mapping[str, str]) -> InputError:
    """The error that names the first problem and counts the others."""
    key, why = next(iter(problems.items()))
    more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
    return InputError(f"{why}{more}", file=adapter.path, key=key, remedy="--allow-partial leaves such parts behind.")


def _unknown(adapter: Adapter, located: Located, which: str, selection: Selection) -> dict[str, str]:
    problems = dict.fromkeys(adapter.unrecognised, "is not understood by the format's reader")
    for ref in located.unknown:
        if selection.left_out(ref) is None:
            problems[str(ref)] = f"matches no module of the {which} base"
    return problems


def prepare(
    adapter: Adapter,
    migration: Migration,
    selection: Selection = Selection(),
    old: Base | None = None,
    new: Base | None = None,
    *,
    deep: bool = False,
    recut: bool = False,
    weakened: bool = False,
    weights_only: bool = False,
    surveyor: Surveyor | None = None,
) -> Preparation:
    """Decide what becomes of each module; reads the updates, and a weight of the old base where one acts on it alone.

    Args:
        adapter: as it was read.
        migration: for its bases.
        selection: which of its modules.
        old: the old base, by which changes of whole parameters are known.
        new: the new base, likewise.
        deep: survey all modules of both bases in place of a fixed sample.
        recut: another rank is wanted than the adapter's own.
        weakened: another strength than 1 is wanted.
        weights_only: no model is run, so that what `auto` came to by the weights is what is forecast.
        surveyor: gives the survey in place of a look at the bases.

    Raises:
        InputError: an update holds NaN or Inf.
    """
    adapter = with_shapes_of(adapter, migration, old)
    which = "old" if migration.source is not None else "new"
    # Of what is selected alone: a migration of few modules holds too few of all names to know the component by.
    located = locate(selection.of(adapter), migration, which)
    # A migration of this adapter's modules alone has no entries for a component of whole parameters alone.
    homes = {name: home_of(migration, name, updates) for name, updates in adapter.components().items()}
    located = replace(located, missing={r: why for r, why in located.missing.items() if homes[r.component] is None})
    left_out = {ref: why for ref in adapter.updates if (why := selection.left_out(ref)) is not None}
    shares = _shares(adapter, {*left_out, *located.vectors}, located, old)
    problems = _unknown(adapter, located, which, selection)
    problems |= {str(token): why for token, why in refused_tokens(adapter, new, migration).items()}
    skipped = {ref: why for ref, why in located.missing.items() if ref not in left_out}
    nearness = {}
    for ref, home in located.modules.items():
        update, entry = adapter.updates[ref], migration.entries.get(home)
        if entry is None or ref in left_out:
            continue
        if not update.fits(entry.shape_old):
            problems[str(ref)] = f"changes {tuple(update.shape)}, the base's weight is {tuple(entry.shape_old)}"
        elif isinstance(update, ByShape) and not update.additive:
            problems[str(ref)] = UNDRAWN
        elif entry.uncovered:
            problems[str(ref)] = entry.reason
        elif entry.transport is None:
            skipped[ref] = entry.reason
        elif old is None and takes_old(update, identity=entry.transport.is_identity, recut=recut, weakened=weakened):
            problems[str(ref)] = f"is a {update.kind}, whose change depends on the old base's weight: give --from too"
        if migration.source is not None and (entry.target is not None or entry.uncovered):
            nearness[ref] = entry.nearness
    wholes = plan_wholes(adapter, migration, old, new, located.vectors)
    wholes = {ref: whole for ref, whole in wholes.items() if ref not in left_out and ref not in located.missing}
    for ref, whole in wholes.items():
        if whole.fate == "problem":
            problems[str(ref)] = whole.reason
        elif whole.fate == "skip":
            skipped[ref] = whole.reason
    homes_of = {ref: migration.entries.get(home) for ref, home in located.modules.items()}
    rotated = {ref for ref, e in homes_of.items() if e is not None and e.transport is not None and e.transport.rotates}
    gone = {ref: why for ref, why in skipped.items() if ref in shares}
    evidence = Evidence(shares, nearness, gone, rotated, _surveyed(located, migration, old, new, deep, surveyor))
    judged = replace(migration, method=migration.used) if weights_only else migration
    judgement = judge(adapter, judged, evidence)
    lost = sum(shares.get(ref, 0.0) for ref in adapter.updates if str(ref) in problems)
    if judgement.verdict == "survives" and lost > 0:
        judgement = replace(judgement, verdict="refine", summary=f"{lost:.0%} of the update can't be carried.")
    return Preparation(migration, located, evidence, judgement, wholes, problems, left_out)


def _surveyed(
    located: Located,
    migration: Migration,
    old: Base | None,
    new: Base | None,
    deep: bool,
    surveyor: Surveyor | None,
) -> Survey | None:
    """The bases beyond the adapter's modules, where both are at hand as a whole."""
    if migration.source is None or old is None or new is None or old.partial or new.partial:
        return None
    touched = set(located.modules.values())
    return surveyor(touched) if surveyor is not None else survey(old, new, touched, deep=deep)


def _shares(
    adapter: Adapter, left_out: Collection[ModuleRef], located: Located, old: Base | None
) -> dict[ModuleRef, float]:
    """Each module's share of ‖ΔW‖² over what is to be carried."""
    squares: dict[ModuleRef, float | None] = {}
    for ref, update in adapter.updates.items():
        if update.by_parameter or ref in left_out:
            continue
        parts = update.parts()
        loaded = {role: InMemory(part.load()) for role, part in parts.items()}
        for role, part in parts.items():
            check_finite(loaded[role].tensor, adapter.path, getattr(part, "name", str(ref)))
        if isinstance(update, LowRank):
            # Most are of this kind, and need not be read again to be measured.
            update = replace(update, up=loaded["up"], down=loaded["down"])
        if update.additive or update.magnitude is not None:
            squares[ref] = update.norm() ** 2
        else:
            squares[ref] = _square_on(update, located.modules.get(ref), old)
    known = [square for square in squares.values() if square is not None]
    # Without the weight that such an update acts on, it counts as much as the others do on average.
    usual = sum(known) / len(known) if known else 1.0
    filled = {ref: usual if square is None else square for ref, square in squares.items()}
    total = sum(filled.values())
    return {ref: square / total if total > 0 else 0.0 for ref, square in filled.items()}


def _square_on(update: Update, home: ModuleRef | None, old: Base | None) -> float | None:
    """‖ΔW‖² on the old base's weight, where that is there."""
    if old is None or home is None or f"{home.path}.weight" not in old.components.get(home.component, {}):
        return None
    # What waits for a shape would have taken this one.
    if isinstance(update, ByShape) or not update.fits(old.shape(home)):
        return None
    return update.norm(old.weight(home)) ** 2
