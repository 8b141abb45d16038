"""The terminal views: first what a person must know, in 80 columns, plain when piped."""

from __future__ import annotations

import io

import pytest
import report_samples as samples
from rich.console import Console

from regraft.report.tables import check_table, port_table, refine_table, verify_table


def piped() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=80, highlight=False), stream


def shown(table: object, record: object) -> str:
    console, stream = piped()
    table(record, console)  # type: ignore[operator]
    return stream.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        shown(port_table, samples.port()),
        shown(port_table, samples.port(samples.llm(2))),
        shown(check_table, samples.check()),
        shown(verify_table, samples.verify()),
        shown(refine_table, samples.refine()),
    ],
)
def test_piped_tables_have_no_colour_codes_and_fit_80_columns(text: str) -> None:
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_port_table_opens_with_verdict_counts_and_skips() -> None:
    report = samples.port()
    text = shown(port_table, report)
    head = " ".join(text[: text.index("block  ")].split())
    assert head.startswith("PORTED")
    assert f"180 ported, 12 skipped ({100 * report.skipped_share:.1f} % of the update's norm), 0 refused" in head
    assert "no counterpart: the new base has no middle block" in head
    assert report.method_reason in head


def test_192_modules_are_told_in_a_screen() -> None:
    text = shown(port_table, samples.port())
    assert len(text.splitlines()) < 50
    assert "unet.up_blocks" not in text or "up_blocks.3.attentions.2" in text


def test_check_table_tells_verdict_forecast_and_tier() -> None:
    text = " ".join(shown(check_table, samples.check(verdict="refused")).split())
    assert text.startswith("REFUSED")
    assert "88 % of a native adapter's gain (79 to 94 %)" in text
    assert "advised port: carry the weights over method copy" in text


def test_verify_table_has_the_controls() -> None:
    text = shown(verify_table, samples.verify())
    assert "0.93 (0.91 to 0.95)" in text
    assert "no effect to compare" in text
    assert "shuffled" in text


def test_refine_table_holds_the_result_against_none_a_copy_and_its_start() -> None:
    text = shown(refine_table, samples.refine())
    assert text.startswith("REFINED ")
    rows = [line.split() for line in text[text.index("on held-out inputs") :].splitlines()[2:6]]
    assert [row[0] for row in rows] == ["none", "copy", "stream", "refined"]
    assert [row[-2:] for row in rows] == [["0.0%", "1.00"], ["2.0%", "0.99"], ["-92.0%", "3.04"], ["87.7%", "0.40"]]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"steps": 0, "recovered": 0.2}, "NOTHING GAINED"),
        ({"steps": 0, "recovered": 1.0}, "NOTHING LEFT TO GAIN"),
        ({"recovered": 0.3}, "REFINED IN PART"),
        ({"recovered": -0.1}, "NOT CARRIED OVER"),
    ],
)
def test_refine_table_tells_each_outcome(changes: dict[str, object], word: str) -> None:
    assert shown(refine_table, samples.refine(**changes)).startswith(word)


def test_markup_in_names_shows_as_text() -> None:
    evil = "[bold red]x[/]"
    report = samples.port([f"unet.{evil}.0.a", "unet.mid_block.a"])
    report = report.model_copy(
        update={
            **dict.fromkeys(("input", "method", "method_reason", "summary", "migration"), evil),
            **{name: [evil] for name in ("outputs", "reasons", "unrecognised")},
            "source": samples.base(evil),
            "modules": [m.model_copy(update={"reason": evil}) for m in report.modules],
        }
    )
    assert shown(port_table, report).count(evil) >= 8
    assert evil in shown(verify_table, samples.verify(controls={evil: samples.verify().controls["copy"]}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"forced": True}, "FORCED"), ({"verdict": "refine"}, "PORTED, REFINE"), ({"verdict": "refused"}, "REFUSED")],
)
def test_port_table_tells_each_outcome(changes: dict[str, object], word: str) -> None:
    assert shown(port_table, samples.port(samples.llm(), **changes)).startswith(word)
