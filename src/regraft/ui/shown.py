"""What the page shows of records, as HTML: the templates of the reports, and a few of its own.

All values pass through the templates' autoescape, since names and metadata come from strangers' files.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader
from markupsafe import Markup

from regraft.errors import RegraftError
from regraft.families import get_family
from regraft.output import in_utf8
from regraft.report.batch_page import groups_of
from regraft.report.batch_table import expected
from regraft.report.html import MEASURED, check_banner, environment, port_banner, refine_banner
from regraft.report.public import without_folders
from regraft.report.refine_chart import draw_course, draw_looks
from regraft.report.refine_schema import RefineReport
from regraft.report.schema import CheckReport, InspectReport, PortReport, VerifyReport
from regraft.ui.beside import two
from regraft.ui.desk import Desk, Progress
from regraft.ui.work import Made

_NO_LINKS: dict[str, Any] = {"files": [], "page": ""}


@cache
def _environment() -> Environment:
    theirs = environment()
    return theirs.overlay(
        loader=ChoiceLoader([PackageLoader("regraft.ui"), theirs.loader or PackageLoader("regraft.report")])
    )


def _part(name: str, **values: Any) -> str:
    return in_utf8(_environment().get_template(name).render(**values))


def style() -> str:
    """The page's style sheet: that of the reports, kept to what regraft shows, and its own."""
    return _part("ui.css")


def head() -> str:
    """The first thing that the page says."""
    return _part("header.html")


def wrong(what: str, remedy: str = "") -> str:
    """An error, with what can be done on this page about it, or else in a terminal."""
    if "--force" in remedy:
        remedy = "There is a box for that among the options of Port; the file says so then."
    elif "--" in remedy:
        remedy = f"On the command line: {remedy}"
    return _part("wrong.html", what=what, remedy=remedy)


def wrong_of(error: RegraftError) -> str:
    """An error of ours, as the command line would tell it."""
    return wrong(*error.told)


def inspected(record: InspectReport) -> str:
    """What a file is."""
    family = get_family(record.family)
    record = without_folders(record)
    return _part("inspected.html", record=record, family=family.title if family else record.family)


def progress(job: Progress | None) -> str:
    """How far the job is; empty where there is none."""
    if job is None or job.state == "done":
        return ""
    if job.state == "error":
        return wrong(*job.wrong)
    return _part("progress.html", job=job, clock=_clock(job.seconds))


def course(job: Progress | None) -> str:
    """A refine at work: its chart and its pictures."""
    if job is None or job.name != "refine" or job.state != "running" or not job.looks:
        return ""
    chart = Markup(draw_looks(job.looks))
    return _part("course.html", job=job, chart=chart, look=job.looks[-1])


def result(desk: Desk, name: str) -> str:
    """What a job made last; empty where it made nothing yet."""
    made = desk.results.get(name)
    if made is None:
        return ""
    record, links = made.record, _links(desk, made)
    if isinstance(record, CheckReport):
        return _verdict(check=without_folders(record), banner=check_banner(record), links=links)
    if isinstance(record, PortReport):
        # The first expert's in full, with the links to all files; of the other its verdict.
        whole = _verdict(port=without_folders(record), banner=port_banner(record), links=links)
        return whole + "".join(
            _verdict(port=without_folders(other), banner=port_banner(other), links=_NO_LINKS) for other in made.also
        )
    if isinstance(record, VerifyReport):
        return _verdict(verify=without_folders(record), banner=MEASURED, links=links)
    if isinstance(record, RefineReport):
        chart = Markup(draw_course(record))
        return _part(
            "refined.html", record=without_folders(record), banner=refine_banner(record), course=chart, links=links
        )
    groups = groups_of(record)
    return _part("library.html", record=record, groups=groups, expected=expected, links=links)


def beside(record: VerifyReport, left: str | None, right: str | None, row: int | None) -> str | None:
    """Two pictures of a comparison under a line that is moved by mouse, finger or keys.

    Args:
        record: the comparison.
        left: column of the left picture.
        right: of the right one.
        row: which of the prompts.

    Returns:
        None where the choice is not made yet, or is of an older comparison.
    """
    pair = two(record, left, right, row)
    return None if pair is None else _part("beside.html", pair=pair)


def _verdict(
    *,
    banner: Any,
    links: Any,
    check: CheckReport | None = None,
    port: PortReport | None = None,
    verify: VerifyReport | None = None,
) -> str:
    what = port.input if port else check.input if check else verify.ported if verify else ""
    values = {"check": check, "port": port, "verify": verify, "banner": banner, "links": links, "what": what}
    return _part("result.html", **values)


def _links(desk: Desk, made: Made) -> dict[str, Any]:
    files = [{"href": f"files/{desk.serve(file)}", "name": Path(file).name, "path": file} for file in made.files]
    return {"files": files, "page": f"reports/{desk.serve(made.page)}" if made.page else ""}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
