"""What changes no weights has no port: the one course of distillation for all such kinds, and its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Protocol

from regraft.base import Base
from regraft.errors import UsageError
from regraft.probes.batches import AtWork, Batches, TextBatch, make_batches
from regraft.refine.aims import aims_by
from regraft.refine.beside import alone, rows, worse_than_none
from regraft.refine.kept import inputs_file, read_or_made
from regraft.refine.loop import Heard, train
from regraft.refine.retained import with_own
from regraft.refine.samples import objective_of, sample_aims, texts_of
from regraft.refine.settings import PULLS, REMEDY, RefineSettings, settled
from regraft.refine.starting import ZERO
from regraft.refine.student import Student
from regraft.refine.teacher import Teacher
from regraft.refine.told import report_of
from regraft.refine.useful import check_useful
from regraft.report.refine_schema import RefineReport
from regraft.runtime.both import BothModels
from regraft.runtime.libraries import quiet_libraries

#: Called with (done, in all, what is at work).
Tick = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Started:
    """An adapter's first state for the new base, in modules of its own.

    Attributes:
        at_work: a context inside of which the new base has it, and has no other number that is trained.
        how: it was made.
        modules: how many modules it has.
        zero: sets it to no effect; None where it has no such state.
        untrained: what of the old one is not trained → what became of it.
    """

    at_work: AtWork
    how: str
    modules: int
    zero: Callable[[], None] | None = None
    untrained: Mapping[str, str] = field(default_factory=dict)


class Unported(Protocol):
    """An adapter that changes no weights, as it was trained on the old base.

    Attributes:
        noun: what it is, in words.
        retains: whether the new base's own texts tell what it is to leave as it was.
    """

    noun: str
    retains: bool

    @property
    def path(self) -> Path: ...

    @property
    def digest(self) -> str:
        """What tells it from others."""
        ...

    def teacher(self, models: BothModels) -> Teacher:
        """Raises InputError: these models can't be run with it."""
        ...

    def start(self, old: Base, new: Base, models: BothModels) -> Started:
        """Raises InputError: there is nothing that it could begin from."""
        ...


def taught(
    adapter: Unported,
    old: Base,
    new: Base,
    settings: RefineSettings,
    *,
    state: Path | None = None,
    heard: Heard = lambda look: None,
    tick: Tick = lambda done, total, what: None,
) -> RefineReport:
    """Distil *old base + adapter* into *new base + its start*, whose modules are left at their best.

    Args:
        adapter: as it was trained on ``old``.
        old: the old base.
        new: the base that it is to run on.
        settings: objective, steps, budget and the rest; what speaks of layers has no meaning here.
        state: a file that the state of the training is kept in, and gone on from.
        heard: called after each look at held-out inputs.
        tick: told of what is at work.

    Raises:
        UsageError: ``settings`` ask for a rank, targets, hidden states, a quantised base, guidance or a bridge.
        InputError: the bases can't be run with it or compared, or it has no effect.
    """
    if settings.rank is not None or settings.targets:
        raise UsageError(f"a {adapter.noun} has no rank and no targets", remedy="Leave --rank and --targets out.")
    if settings.hidden > 0 or settings.quantize != "none":
        raise UsageError(
            f"a {adapter.noun} is learnt from outputs of the whole base", remedy="Leave --hidden and --quantize out."
        )
    if settings.guidance is not None:
        raise UsageError(f"nothing is drawn with a {adapter.noun}", remedy="Leave --guidance out.")
    if settings.teacher == "bridge" or settings.mapper is not None:
        raise UsageError(
            f"a {adapter.noun} is learnt from what the old base writes with it: no bridge runs one",
            remedy="Leave --teacher and --mapper out.",
        )
    began = perf_counter()
    settings = settings if adapter.retains else replace(settings, retention=0.0)
    with quiet_libraries():
        models = BothModels.load(
            old, new, settings.config, settings.device, in_turns=settings.low_memory, remedy=REMEDY
        )
        teacher = adapter.teacher(models)
        chosen, why = objective_of(settings.objective, models)
        sampled = chosen == "sample"
        settings = settled(settings, far=old.structure != new.structure, texts=True, sampled=sampled)
        file = inputs_file(adapter.digest, old, new, settings, sampled)
        inputs, unkept = read_or_made(
            file, partial(_inputs_of, models, teacher, settings, sampled=sampled, retains=adapter.retains)
        )
        batches = (*inputs.fit, *inputs.held_out)
        check_useful(batches, adapter.path)
        if sampled:
            aims = sample_aims(models, teacher, batches, tick=tick)
        else:
            aims = aims_by(models, teacher, batches, PULLS[chosen], stay=settings.stay, tick=tick)
        fit, held = aims[: len(inputs.fit)], aims[len(inputs.fit) :]
        start = adapter.start(old, new, models)
        # The old base has said all that is wanted of it: its memory is the training's.
        target = models.new
        with models.turn("new"):
            del models, teacher
        none, how, reason = alone(target, held), start.how, ""
        with start.at_work():
            if start.zero is not None and how != ZERO and (reason := worse_than_none(how, target, held)):
                how = ZERO
                start.zero()
            student = Student(target, {}, {}, {})
            course = train(student, fit, held, settings, heard=heard, state=state)
            trained = sum(parameter.numel() for parameter in student.parameters())
    return report_of(
        adapter.path,
        (old, new),
        course,
        replace(inputs, made=inputs.made.replace("its adapter", f"its {adapter.noun}")),
        start=(how, reason),
        objective=(chosen, why),
        beside=rows(how, course, none, None),
        trained=trained,
        modules=start.modules,
        untrained=start.untrained,
        unkept=unkept,
        began=began,
    )


def _inputs_of(
    models: BothModels, teacher: Teacher, settings: RefineSettings, *, sampled: bool, retains: bool
) -> Batches:
    """Texts by the old base with the adapter and without it, and for retention by the new base.

    Where there is nothing to retain, samples of the new base are left out, and its other texts are read like any.
    """
    if sampled:
        found = texts_of(models, teacher, settings)
        return found if retains else replace(found, held_out=found.held("adapter"))
    asked = (settings.n_inputs, settings.seed, settings.prompts)
    found = make_batches(models, None, *asked, at_work=teacher.at_work)
    if not retains:
        held = (replace(batch, made_by="given") for batch in found.held_out if isinstance(batch, TextBatch))
        return replace(found, held_out=tuple(held))
    return with_own(found, models, settings)
