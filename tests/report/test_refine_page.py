"""The page of a refine: where it came to, how it went, and a stranger's words as words."""

from __future__ import annotations

import re

import pytest
import report_samples as samples
from test_html import Page

from regraft.report.refine_chart import draw_course
from regraft.report.refine_page import render_refine
from regraft.report.refine_schema import Refined, RefineReport


def words(report: RefineReport) -> str:
    return Page(render_refine(report)).words


def test_it_opens_with_the_verdict_the_share_and_what_it_cost() -> None:
    report = samples.refine()
    text = words(report)
    head = text[: text.index("Where it came to")]
    assert "Refined" in head
    for figure in (report.summary, "87.7 %", "80 steps", "288 self-made inputs", "131 s", "890 MB"):
        assert figure in head
    for fact in (report.objective_reason, report.start_reason, report.inputs, report.stopped, report.outputs[0]):
        assert fact in head


def test_none_copy_start_and_refined_stand_side_by_side() -> None:
    text = words(samples.refine())
    table = text[text.index("Where it came to") : text.index("The course")]
    at = [
        table.index(name) for name in ("new base alone 0 %", "plain copy", "stream the start -92.0 %", "refined 87.7 %")
    ]
    assert at == sorted(at)
    assert "4 of 84 modules have no place" in table


def test_a_bar_of_less_than_nothing_goes_to_the_left_of_zero() -> None:
    page = render_refine(samples.refine())
    axis_zero = 100 * 0.5 / 1.5
    bars = re.findall(r'<i( class="less")? style="left:([0-9.]+)%;width:([0-9.]+)%"', page)
    less = [(float(left), float(width)) for name, left, width in bars if name]
    assert less == [(0.0, pytest.approx(axis_zero, abs=0.02))]
    refined = float(bars[-1][1]), float(bars[-1][2])
    assert refined == (pytest.approx(axis_zero, abs=0.02), pytest.approx(100 * 0.877 / 1.5, abs=0.02))


def test_without_inputs_for_retention_no_drift_is_told() -> None:
    report = samples.refine()
    report = report.model_copy(
        update={
            name: [row.model_copy(update={"drift": None}) for row in getattr(report, name)]
            for name in ("beside", "looks")
        }
    )
    text = words(report)
    assert "Drift on" not in text[: text.index("Every look")]


def test_the_strip_ends_with_what_is_kept() -> None:
    report = samples.refine()
    page = Page(render_refine(report))
    images = [attrs["alt"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(report.prompts) * len(report.pictures)
    assert images[len(report.pictures) - 1] == f"{report.prompts[0]}: 80 steps"


def test_parts_that_were_not_trained_are_told_with_their_reason() -> None:
    text = words(samples.refine())
    assert "a bias: kept as it was ported" in text[text.index("Not trained") :]


def test_the_curve_marks_every_look_and_the_step_that_is_kept() -> None:
    report = samples.refine()
    svg = draw_course(report)
    assert svg.count('class="gained-dot"') == svg.count('class="drift-dot"') == len(report.looks)
    (kept,) = re.findall(r'class="kept-line" x1="([0-9.]+)"', svg)
    dots = dict(re.findall(r"<title>step (\d+), [^<]*</title><circle[^>]* cx=\"([0-9.]+)\"", svg))
    assert dots[str(report.steps)] == kept
    # The start lies below the axis: a triangle at the edge.
    assert "0" not in dots


def test_a_start_that_has_it_all_has_no_curve() -> None:
    report = samples.refine(looks=samples.refine().looks[:1], steps=0, recovered=1.0)
    assert draw_course(report) == ""
    assert "The course of the training" not in words(report)


def test_strangers_text_shows_as_text_and_folders_are_left_out() -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    report = samples.refine(
        **dict.fromkeys(
            ("start_reason", "objective", "objective_reason", "inputs", "stopped", "unkept", "summary"), evil
        ),
        input="/home/someone/loras/style.safetensors",
        start="/home/someone/ported.safetensors",
        outputs=[evil],
        prompts=[evil],
        untrained={evil: evil},
        beside=[Refined(title="none", recovered=0.0), Refined(title=evil, recovered=0.5, note=evil)],
    )
    source = render_refine(report)
    page = Page(source)
    assert evil in page.text
    assert "<script" not in source
    assert not [tag for tag, attrs in page.tags if "onerror" in attrs or attrs.get("src") == "x"]
    assert "someone" not in source
    assert "ported.safetensors" in page.text


def test_another_record_is_refused() -> None:
    with pytest.raises(TypeError, match="RefineReport"):
        render_refine(samples.verify())  # type: ignore[arg-type]
