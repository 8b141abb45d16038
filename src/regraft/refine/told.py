"""What a course came to, in the words and fields that reports and lineages share."""

from __future__ import annotations

from regraft.refine.loop import Course, Look
from regraft.report.refine_schema import RefineLook, RefineReport


def summary_of(start: str, course: Course) -> str:
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
