"""What a course came to, in the words and fields that reports and lineages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter

from regraft._version import __version__
from regraft.base import Base
from regraft.memory import peak_mb
from regraft.migration import summarise
from regraft.probes.batches import Batches
from regraft.refine.loop import Course, Look
from regraft.report.refine_schema import Refined, RefineLook, RefineReport


def report_of(
    path: Path | None,
    bases: tuple[Base, Base],
    course: Course,
    inputs: Batches,
    *,
    start: tuple[str, str],
    objective: tuple[str, str],
    beside: Sequence[Refined],
    trained: int,
    modules: int,
    untrained: Mapping[str, str],
    unkept: str,
    began: float,
    seconds: Callable[[Look], float] = lambda look: look.seconds,
) -> RefineReport:
    """The record of a refine that has just ended, with what those of every kind of adapter tell.

    Args:
        path: the adapter's.
        bases: the old and the new one.
        course: the training.
        inputs: what it learnt from and was looked at with.
        start: how it began, and why so.
        objective: what was matched, and why that.
        beside: what the result is held against.
        trained: numbers.
        modules: that were trained.
        untrained: part of the adapter → what became of it.
        unkept: why the inputs could not be kept on disk.
        began: when, by `time.perf_counter`.
        seconds: of the training until a look.
    """
    best = course.best_look
    return RefineReport(
        regraft_version=__version__,
        input=str(path),
        outputs=[],
        start=start[0],
        start_reason=start[1],
        objective=objective[0],
        objective_reason=objective[1],
        inputs=inputs.made,
        n_inputs=sum(len(batch) for batch in inputs.fit),
        steps=best.step,
        stopped=course.stopped,
        unkept=course.unkept or unkept,
        recovered=best.recovered,
        beside=list(beside),
        looks=[look_row(look, seconds(look)) for look in course.looks],
        summary=_summary(start[0], course),
        trained=trained,
        modules=modules,
        untrained=dict(untrained),
        source=summarise(bases[0]),
        target=summarise(bases[1]),
        seconds=perf_counter() - began,
        peak_mb=peak_mb(),
    )


def _summary(start: str, course: Course) -> str:
    """A course in a sentence."""
    before, after = course.looks[0], course.best_look
    if after.step == 0:
        return f"Nothing gained: the start ({start}) is at {before.recovered:.0%} of what is wanted, and is kept."
    return f"From {before.recovered:.0%} ({start}) to {after.recovered:.0%} of what is wanted, in {after.step} steps."


def look_row(look: Look, seconds: float) -> RefineLook:
    """A look as reports have it."""
    return RefineLook(
        step=look.step,
        recovered=look.recovered,
        drift=look.kept,
        seconds=round(seconds, 2),
        training_loss=look.learnt,
    )


def lineage_entry(report: RefineReport) -> dict[str, object]:
    """What a lineage tells of a refine, under ``refined`` (docs/standard.md)."""
    return {
        "objective": f"{report.objective}+hidden" if report.hidden else report.objective,
        "start": report.start if report.start_reason != "as given" else "given",
        "steps": report.steps,
        "inputs": report.n_inputs,
        "how": report.inputs[:4096],
        "recovered": round(report.recovered, 4),
    }
