"""The record of a refine as one self-contained HTML page: no script, nothing loaded from anywhere."""

from __future__ import annotations

from markupsafe import Markup

from regraft.report.html import Scale, environment, refine_banner
from regraft.report.public import without_folders, without_pictures
from regraft.report.refine_chart import draw_course
from regraft.report.refine_schema import RefineReport

#: A row below this is drawn at the edge: a start can be worse than nothing by any measure.
_LOWEST = -0.5

#: What each figure means, and what it does not.
MEANINGS = (
    (
        "Share of what is wanted",
        "How much nearer the new base came to what it is taught, on inputs that it did not learn from: 0 is the new "
        "base alone, 1 all of it. Below 0 it is further away than the new base alone.",
        "What is wanted is what the old base says with its adapter. It is no measure of a picture or an answer, and "
        "not the share of a natively trained adapter's gain.",
    ),
    (
        "Drift",
        "How far it is from what is wanted on inputs that the new base made by itself, in units of the adapter's own "
        "change there. Lower is better; the first row has that of the new base alone.",
        "It tells whether the new base stays itself, not whether the adapter works.",
    ),
)


def render_refine(report: RefineReport) -> str:
    """The page of a refine.

    Raises:
        TypeError: it is another record.
    """
    if not isinstance(report, RefineReport):
        raise TypeError(f"this page shows a RefineReport, not a {type(report).__name__}")
    record = without_folders(report)
    return (
        environment()
        .get_template("refine.html")
        .render(
            record=record,
            banner=refine_banner(record),
            scale=Scale(max(_LOWEST, min(0.0, *(row.recovered for row in record.beside))), 1.0),
            course=Markup(draw_course(record)),
            explained=MEANINGS if _has_drift(record) else MEANINGS[:1],
            has_drift=_has_drift(record),
            json=without_pictures(record).to_json(),
        )
    )


def _has_drift(record: RefineReport) -> bool:
    return any(row.drift is not None for row in record.beside)
