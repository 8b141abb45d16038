"""What the refined adapter is held against: the new base alone, a plain copy, and the start, on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from regraft.adapter import Adapter
from regraft.changes import is_copied
from regraft.refine.aims import Aim
from regraft.refine.loop import Course, Look, measured
from regraft.report.refine_schema import Refined
from regraft.runtime.applied import applied, fitting
from regraft.runtime.load import Loaded

#: Titles of the rows that every refine has.
NONE, COPY, REFINED = "none", "copy", "refined"
#: And of one that is there where such an adapter was given.
NATIVE = "native"


def alone(new: Loaded, held: Sequence[Aim]) -> Refined:
    """The new base without an adapter: by definition nothing of what is wanted; its drift tells how that is meant.

    Args:
        new: the new base, as it is.
        held: held-out aims, the same ones that the student is looked at with.
    """
    return Refined(title=NONE, recovered=0.0, drift=measured(held, new)[1])


def placed(title: str, adapter: Adapter, new: Loaded, held: Sequence[Aim]) -> Refined | None:
    """An adapter as it is on the new base: a plain copy, or a native one. None where no module of it can be there.

    Args:
        title: `COPY` or `NATIVE`.
        adapter: by whichever base's names.
        new: the new base, as it is.
        held: held-out aims, the same ones that the student is looked at with.
    """
    # SVDiff's and LoRA-X's numbers belong to the old weight's singular values.
    can = {ref: update for ref, update in adapter.updates.items() if title != COPY or is_copied(update)}
    found = fitting(new.components, replace(adapter, updates=can))
    if not found.updates:
        return None
    with applied(new.components, found):
        lacking, drift = measured(held, new)
    if lacking is None:
        return None
    lost = len(adapter.updates) - len(found.updates)
    note = f"{lost} of {len(adapter.updates)} modules can't be placed there" if lost else ""
    return Refined(title=title, recovered=1.0 - lacking, drift=drift, note=note)


def worse_than_none(what: str, model: Loaded, held: Sequence[Aim]) -> str:
    """Why a start is dropped: the new base alone is nearer to what is wanted. Empty where it is not.

    Args:
        what: the start, in words.
        model: the new base with the start at work.
        held: held-out aims.
    """
    lacking, _ = measured(held, model)
    if lacking is None or lacking <= 1:
        return ""
    return f"the {what} does worse than the new base alone ({1 - lacking:.0%})"


def rows(
    start: str, course: Course, none: Refined, copy: Refined | None, native: Refined | None = None
) -> list[Refined]:
    """None, copy, start, refined and native, in this order; a start that is the copy is told once.

    Args:
        start: how the start was ported.
        course: the training.
        none: what `alone` gave.
        copy: what `placed` gave of the original.
        native: likewise of an adapter that was trained on the new base.
    """
    found = [none, *([copy] if copy is not None and start != COPY else [])]
    found += [_of(start, course.looks[0]), _of(REFINED, course.best_look)]
    return [*found, *([native] if native is not None else [])]


def _of(title: str, look: Look) -> Refined:
    return Refined(title=title, recovered=look.recovered, drift=look.kept)
