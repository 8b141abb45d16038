"""What ``demo --refine`` adds: a column with its cost, or the reason why there is none."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from regraft import InputError, load_adapter, open_base
from regraft.cli.demo import _table
from regraft.demo import Column, _notes, _with_refined, data_folder, refining
from regraft.demo.refining import FAR, cost, refine_far
from regraft.refine import RefineResult
from regraft.report.demo_schema import FarUpgrade
from regraft.report.html import render_demo

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
import report_samples as samples
from test_html import Page

DATA = data_folder()
STYLE = DATA / "loras" / "style-v1.safetensors"
RETRAINED, V3 = FAR
REASON = "the autoencoders differ: their latents of the same pictures are 130% apart"


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A refine that takes no time: into v2-retrained it comes to something, into v3 it is not possible."""
    calls: list[dict[str, Any]] = []

    def refine(adapter: Any, old: Any, new: Any, **options: Any) -> RefineResult:
        calls.append({"new": new.path.name, **options})
        if new.path.name == "v3":
            raise InputError(REASON, file=new.path)
        return RefineResult(load_adapter(DATA / "loras" / "style-v2-retrained.safetensors"), samples.refine())

    monkeypatch.setattr(refining, "refine", refine)
    return calls


def refined(far: refining.Far, folder: Path) -> FarUpgrade:
    file = folder / f"{far.base}.safetensors"
    asked = ["owl on pink"], 2.0
    return refine_far(
        far, load_adapter(STYLE), open_base(DATA / "v1"), DATA / far.base, file, *asked, lambda what: None
    )


def both(folder: Path) -> list[FarUpgrade]:
    return [refined(far, folder) for far in FAR]


def test_what_was_refined_is_written_and_told_with_its_cost(faked: list[dict[str, Any]], tmp_path: Path) -> None:
    far = refined(RETRAINED, tmp_path)
    assert far.label == "v1 → v2-retrained"
    assert far.refine is not None
    assert far.refine.outputs == [str(tmp_path / "v2-retrained.safetensors")]
    assert load_adapter(far.refine.outputs[0]).updates
    assert cost(far) == "131 s, 48 self-made pictures, 80 steps"


def test_a_refine_that_is_not_possible_is_a_reason_and_no_error(faked: list[dict[str, Any]], tmp_path: Path) -> None:
    far = refined(V3, tmp_path)
    assert far.refine is None
    assert far.reason == REASON
    assert list(tmp_path.iterdir()) == []


def test_both_go_the_way_of_every_refine(faked: list[dict[str, Any]], tmp_path: Path) -> None:
    both(tmp_path)
    assert [call["new"] for call in faked] == ["v2-retrained", "v3"]
    for call, far in zip(faked, FAR, strict=True):
        assert call["settings"].objective == "auto"
        assert call["settings"].n_inputs == far.pictures * far.levels
        assert call["settings"].prompts == ("owl on pink",)
        assert call["settings"].guidance == 2.0


def test_a_refined_column_stands_behind_its_bases_own(faked: list[dict[str, Any]], tmp_path: Path) -> None:
    columns = [
        Column("far", "v2-retrained", "v2-retrained", None),
        Column("far", "v2-retrained + copied", "v2-retrained", STYLE),
        Column("farther", "v3", "v3", None),
    ]
    found = _with_refined(columns, both(tmp_path))
    assert [column.title for column in found] == [
        *("v2-retrained", "v2-retrained + copied", "v2-retrained + refined", "v3")
    ]
    assert found[2].group == "far"
    assert found[2].lora == tmp_path / "v2-retrained.safetensors"
    assert "131 s" in found[2].note


def record(refined: list[FarUpgrade]) -> Any:
    demo = samples.demo()
    column = demo.columns[7].model_copy(
        update={"title": "v2-retrained + refined", "figures": {"style_share": 0.99}, "note": cost(refined[0])}
    )
    columns = [*demo.columns[:8], column, *demo.columns[8:]]
    assert demo.near.verify is not None
    notes = _notes(columns, demo.refusals, refined, demo.near.verify)
    return demo.model_copy(update={"refined": refined, "columns": columns, "notes": notes})


def test_the_page_shows_the_cost_beside_the_columns_and_why_one_is_missing(
    faked: list[dict[str, Any]], tmp_path: Path
) -> None:
    page = Page(render_demo(record(both(tmp_path))))
    for words in (
        "v2-retrained + refined 131 s, 48 self-made pictures, 80 steps",
        "v1 → v2-retrained, refined Refined",
        f"v1 → v3, refined Not possible yet {REASON[0].upper()}{REASON[1:]}",
        "v2-retrained + refined 87.7 % 131 48 80 890 MB",
        f"v3 + refined not possible yet: {REASON}",
        "Refined for v2-retrained, the style share goes from 0.11 to 0.99.",
    ):
        assert words in page.words
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 10 * len(samples.PROMPTS)
    assert str(tmp_path) not in page.text


def test_a_strangers_reason_shows_as_text(faked: list[dict[str, Any]], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    far = both(tmp_path)
    source = render_demo(record([far[0], far[1].model_copy(update={"reason": evil})]))
    assert evil in Page(source).text
    assert "<script" not in source


def test_the_terminal_table_has_the_costs(faked: list[dict[str, Any]], tmp_path: Path) -> None:
    stream = io.StringIO()
    _table(record(both(tmp_path)), tmp_path / "report.html", Console(file=stream, width=100, highlight=False))
    text = stream.getvalue()
    assert "self-made pictures" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("v2-retrained + refined")]
    assert row[-4:] == ["0.99", "131", "48", "80"]
    assert REASON in " ".join(text.split())


def test_without_the_option_nothing_of_it_is_shown() -> None:
    page = Page(render_demo(samples.demo()))
    assert "refined columns cost" not in page.words
    assert "Not possible yet" not in page.words


def test_the_option_stands_in_the_help(run: Any) -> None:
    ran = run("demo", "--help")
    assert "--refine" in ran.out
