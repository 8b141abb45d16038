"""A ported adapter brought the rest of the way by a short distillation, on inputs that the old base makes itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal

from regraft.adapter import Adapter
from regraft.base import Base
from regraft.bridge.x_adapter.files import check_mapper
from regraft.errors import InputError
from regraft.lineage import KEY, dumped, lineage_of
from regraft.metadata import with_ranks
from regraft.methods.task import Running
from regraft.probes.batches import Batches, make_batches
from regraft.probes.diffusion import reads_prompts
from regraft.refine.aims import Aim, aims_of
from regraft.refine.beside import COPY, NATIVE, alone, placed, rows, worse_than_none
from regraft.refine.bridged import check_draws, check_teacher
from regraft.refine.hidden import with_hidden
from regraft.refine.kept import inputs_file, read_or_made
from regraft.refine.loop import Heard, Look, train
from regraft.refine.pictures import picture_inputs
from regraft.refine.prompting import picture_prompts
from regraft.refine.quantised import check_quantiser
from regraft.refine.retained import with_own
from regraft.refine.samples import objective_of, sample_aims, samples_of
from regraft.refine.settings import PULLS, REMEDY, Objective, RefineSettings, settled
from regraft.refine.starting import STREAM, ZERO, Start, from_zero, start_of
from regraft.refine.strip import Strip
from regraft.refine.student import Student, could_train, nothing_to_train, student_of, why_not
from regraft.refine.teacher import Teacher
from regraft.refine.told import lineage_entry, report_of
from regraft.refine.useful import check_useful
from regraft.report.refine_schema import RefineReport
from regraft.runtime.applied import applied, fitting
from regraft.runtime.both import BothModels, modules_of
from regraft.runtime.libraries import quiet_libraries
from regraft.runtime.load import Loaded
from regraft.settling import settled as in_its_format
from regraft.updates import LowRank

__all__ = ["Look", "Objective", "RefineResult", "RefineSettings", "Strip", "refine"]

#: Called with (done, in all, what is at work).
Tick = Callable[[int, int, str], None]


def _no_tick(done: int, total: int, what: str) -> None:
    pass


@dataclass(frozen=True)
class RefineResult:
    """The refined adapter, and what it came to."""

    adapter: Adapter
    report: RefineReport

    def save(self, path: str | Path, *, format: str | None = None, overwrite: bool = False) -> list[Path]:
        """See `Adapter.save`."""
        return self.adapter.save(path, format=format, overwrite=overwrite)


def refine(
    adapter: Adapter,
    old: Base,
    new: Base,
    *,
    start: Adapter | Literal["zero"] | None = None,
    settings: RefineSettings = RefineSettings(),
    state: Path | None = None,
    tick: Tick = _no_tick,
    heard: Heard = lambda look: None,
    strip: Strip | None = None,
    native: Adapter | None = None,
) -> RefineResult:
    """Distil *old base + adapter* into *new base + adapter*.

    Args:
        adapter: as it was trained on ``old``.
        old: the old base.
        new: the base that it is to run on.
        start: a port to begin from, by the new base's names; or ``zero``; by default what `auto` makes.
        settings: objective, steps, budget and the rest.
        state: a file that the state of the training is kept in, and gone on from.
        tick: told of what is at work.
        heard: called after each look at held-out inputs.
        strip: draws pictures at some of the looks, for the report; their time counts towards a budget.
        native: an adapter that was trained on ``new``, to be measured beside the refined one.

    Raises:
        UsageError: settings don't go together.
        Refused: the adapter is for another family.
        InputError: the bases can't be run or compared, the adapter has no effect, nothing of it can be trained, or no
            module of ``native`` has a place in the new base.
    """
    began = perf_counter()
    check_quantiser(settings.quantize)
    check_teacher(settings)
    if settings.mapper is not None:
        # Before anything is loaded: it may be for other bases.
        check_mapper(settings.mapper, old, new)
    first, its_base = (start, new) if isinstance(start, Adapter) else (adapter, old)
    if not settings.targets and not could_train(first, its_base):
        raise nothing_to_train(first.path)
    strip = strip or Strip(0)
    # The start that looks at outputs would hold both models on the device.
    apart = settings.low_memory and settings.device != "cpu"
    running = Running(
        settings.n_inputs, settings.seed, settings.prompts, settings.config, settings.device, weights_only=apart
    )
    if start == ZERO:
        begin = from_zero(adapter, old, new)
    else:
        begin = start_of(adapter, old, new, running, tick) if start is None else _given(start)
    with quiet_libraries():
        models = BothModels.load(
            old, new, settings.config, settings.device, in_turns=settings.low_memory, remedy=REMEDY
        )
        check_draws(models, settings)
        chosen, why = objective_of(settings.objective, models, settings.teacher)
        sampled = chosen == "sample"
        far = begin.how in (ZERO, STREAM) or old.structure != new.structure
        settings = settled(settings, far=far, texts=models.old.kind == "language", sampled=sampled)
        file = inputs_file(adapter, old, new, settings, sampled)
        inputs, unkept = read_or_made(file, partial(inputs_of, models, adapter, settings, sampled=sampled))
        batches = (*inputs.fit, *inputs.held_out)
        check_useful(batches, adapter.path)
        if sampled:
            aims = sample_aims(models, Teacher.of(models, adapter), batches, tick=tick)
        else:
            aims = aims_of(models, adapter, batches, PULLS[chosen], stay=settings.stay, tick=tick)
        fit, held = aims[: len(inputs.fit)], aims[len(inputs.fit) :]
        hidden = ""
        if settings.hidden > 0:
            fit, hidden = with_hidden(models, adapter, (old, new), fit, stay=settings.stay, tick=tick)
        strip.before(models, adapter)
        # The old base has said all that is wanted of it: its memory is the training's.
        target = models.new
        with models.turn("new"):
            del models
        if start is None:
            begin = _better_than_none(begin, adapter, (old, new), target, held)
        none, copy = alone(target, held), placed(COPY, adapter, target, held)
        known = None if native is None else placed(NATIVE, native, target, held)
        if native is not None and known is None:
            raise InputError("changes no module of the new base: it is not native to it", file=native.path)
        made = student_of(
            target,
            begin.adapter,
            rank=settings.rank,
            targets=settings.targets,
            seed=settings.seed,
            quantize=settings.quantize,
            precision=settings.precision,
        )
        # Likewise of the whole new base, where the student's is quantised.
        del target
        with made as student:
            course = train(student, fit, held, settings, heard=strip.beside(student.model, heard), state=state)
            strip.after(course.best_look, student.model)
            # Where nothing was gained, the very bytes of the start.
            gained = course.best_look.step > 0 or settings.rank is not None
            refined = begin.adapter
            if gained:
                refined, _ = in_its_format(refined, student.updates(), (), new)
            trained, modules = sum(p.numel() for p in student.parameters()), len(student.layers)
            untrained, quantised = _untrained(student), student.quantised
        beside = rows(begin.how, course, none, copy, known)
    report = report_of(
        adapter.path,
        (old, new),
        course,
        inputs,
        start=(begin.how, begin.reason),
        objective=(chosen, why),
        beside=beside,
        trained=trained,
        modules=modules,
        untrained=untrained,
        unkept=unkept,
        began=began,
        seconds=strip.training,
    )
    drawn = {"prompts": strip.rows, "pictures": strip.columns}
    report = report.model_copy(update={"hidden": hidden, "quantised": quantised, **drawn})
    metadata = with_ranks(_told(refined, report), refined.updates.values())
    return RefineResult(replace(refined, metadata=metadata), report)


def inputs_of(models: BothModels, adapter: Adapter, settings: RefineSettings, *, sampled: bool = False) -> Batches:
    """Inputs from the old base with and without the adapter, and for retention from the new base.

    Args:
        models: both bases.
        adapter: for the old one.
        settings: how many, from which seed and prompts.
        sampled: as samples to learn from; see `regraft.refine.samples`.
    """
    draws = models.old.pipeline is not None and reads_prompts(models.old)
    prompts, told = picture_prompts(adapter, settings.prompts, settings.seed) if draws else (settings.prompts, "")
    if sampled or draws:
        asked = replace(settings, prompts=prompts)
        make = samples_of if sampled else _states_of
        found = make(models, adapter, asked)
        return replace(found, made=f"{found.made}, for {told}" if told else found.made)
    if models.old.kind == "denoiser" and models.old.pipeline is not None:
        return _states_of(models, adapter, settings)
    found = make_batches(models, adapter, settings.n_inputs, settings.seed, settings.prompts)
    return with_own(found, models, settings)


def _states_of(models: BothModels, adapter: Adapter, settings: RefineSettings) -> Batches:
    asked = (settings.n_inputs, settings.seed, settings.prompts)
    return picture_inputs(models, adapter, *asked, kept=settings.kept > 0, guidance=settings.guidance)


def _better_than_none(
    begin: Start, adapter: Adapter, bases: tuple[Base, Base], new: Loaded, held: Sequence[Aim]
) -> Start:
    """The start; or nothing, where the new base alone is nearer to what is wanted."""
    if begin.how == ZERO:
        return begin
    with applied(new.components, fitting(new.components, begin.adapter)):
        reason = worse_than_none(f"port by {begin.how}", new, held)
    if not reason:
        return begin
    try:
        zero = from_zero(adapter, *bases)
    except InputError:
        return begin
    return replace(zero, reason=reason)


def _given(start: Adapter) -> Start:
    return Start(start, str(start.path), "as given")


def _untrained(student: Student) -> dict[str, str]:
    said = {}
    modules = modules_of(student.model, student.rest)
    for ref, update in student.rest.items():
        low_rank = update if isinstance(update, LowRank) else None
        here = student.model, ref, modules.get(ref), student.encoders
        what = f"a {update.kind}" if low_rank is None else why_not(*here, low_rank)
        said[str(ref)] = f"{what}: kept as it was ported"
    return said


def _told(adapter: Adapter, report: RefineReport) -> dict[str, str]:
    """The metadata with the refine in the lineage's last port."""
    lineage = lineage_of(adapter)
    if lineage is None or not lineage.get("ports"):
        raise InputError(
            "has no lineage that tells of its port", file=adapter.path, remedy="Port it with `regraft port`."
        )
    ports = [*lineage["ports"][:-1], {**lineage["ports"][-1], "refined": lineage_entry(report)}]
    return {**adapter.metadata, KEY: dumped({**lineage, "ports": ports})}
