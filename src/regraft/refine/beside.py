"""What the refined adapter is held against: the new base alone, a plain copy, and the start, on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.adapter import Adapter
from regraft.refine.aims import Aim
from regraft.refine.loop import Course, Look, measured
from regraft.report.refine_schema import Refined
from regraft.runtime.applied import applied, fitting
from regraft.runtime.load import Loaded

#: Titles of the rows that every refine has.
NONE, COPY, REFINED = "none", "copy", "refined"


def alone(new: Loaded, held: Sequence[Aim]) -> Refined:
    """The new base without an adapter: by definition nothing of what is wanted; its drift tells how that is meant.

    Args:
        new: the new base, as it is.
        held: held-out aims, the same ones that the student is looked at with.
    """
    return Refined(title=NONE, recovered=0.0, drift=measured(held, new)[1])


def copied(adapter: Adapter, new: Loaded, held: Sequence[Aim]) -> Refined | None:
    """A plain copy of the original on the new base; None where no module of it has a place there.

    Args:
        adapter: as it was trained on the old base.
        new: the new base, as it is.
        held: held-out aims, the same ones that the student is looked at with.
    """
    copy = fitting(new.components, adapter)
    if not copy.updates:
        return None
    with applied(new.components, copy):
        lacking, drift = measured(held, new)
    if lacking is None:
        return None
    lost = len(adapter.updates) - len(copy.updates)
    note = f"{lost} of {len(adapter.updates)} modules have no place" if lost else ""
    return Refined(title=COPY, recovered=1.0 - lacking, drift=drift, note=note)


def rows(start: str, course: Course, none: Refined, copy: Refined | None) -> list[Refined]:
    """None, copy, start and refined, in this order; a start that is the copy is told once.

    Args:
        start: how the start was ported.
        course: the training.
        none: what `alone` gave.
        copy: what `copied` gave.
    """
    found = [none, *([copy] if copy is not None and start != COPY else [])]
    return [*found, _of(start, course.looks[0]), _of(REFINED, course.best_look)]


def _of(title: str, look: Look) -> Refined:
    return Refined(title=title, recovered=look.recovered, drift=look.kept)
