"""The tables and the page say what the record says: marks, refusals, errors, command and date."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import toyworld
from running import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from test_html import Page

from regraft.bench import run as bench_run
from regraft.bench import table
from regraft.bench.goals import goals
from regraft.bench.results import load, save
from regraft.report.bench_chart import draw_pair, drawn_rows
from regraft.report.bench_page import render_bench
from regraft.report.bench_schema import BenchReport, BenchRow
from regraft.report.schema import Interval

ROOT = Path(__file__).parents[2]
NULL = Interval(mean=None, low=None, high=None, reason="not scored")


def line(record: BenchReport, name: str) -> list[str]:
    return next(cells for cells in table.summary(record)[1] if cells[0] == name)


def with_difference(low: float, high: float, **more: object) -> BenchRow:
    mean = (low + high) / 2
    return BenchRow(
        name="effect",
        kind="method",
        recovery=Interval(mean=0.5, low=0.4, high=0.6),
        versus_copy=Interval(mean=mean, low=low, high=high),
        teacher_share=NULL,
        retention=NULL,
        **more,  # type: ignore[arg-type]
    )


def test_a_method_that_loses_to_the_copy_is_marked(toy_record: BenchReport) -> None:
    assert line(toy_record, "lora-x half rank")[1].endswith("▼")
    assert "▼" not in line(toy_record, "copy")[1]


@pytest.mark.parametrize(("low", "high", "sign"), [(-0.2, -0.1, " ▼"), (-0.1, 0.1, ""), (0.1, 0.2, " ▲")])
def test_only_a_whole_interval_makes_a_mark(low: float, high: float, sign: str) -> None:
    assert table.mark(with_difference(low, high)) == sign


def test_what_was_forced_stands_in_brackets_and_what_failed_is_crossed(toy_record: BenchReport) -> None:
    assert re.fullmatch(r"\(−?\d\.\d\d( ▼)?\)", line(toy_record, "auto")[2])
    assert line(toy_record, "copy")[2] == "×"


def test_a_mean_over_some_of_the_adapters_says_over_how_many(toy_record: BenchReport) -> None:
    row = with_difference(0.1, 0.2)
    some = row.recovery.model_copy(update={"reason": "defined on 4 of 8 adapters"})
    assert table.recovery(row) == "0.50 ▲"
    assert table.recovery(row.model_copy(update={"recovery": some})) == "0.50 ▲ (4 of 8)"
    assert table.recovery(row.model_copy(update={"recovery": some, "refused": True})) == "(0.50 ▲) (4 of 8)"
    assert "(4 of 8)" not in table.legend(toy_record)


def test_an_error_names_the_adapters_that_it_came_up_on(toy_record: BenchReport) -> None:
    near = toy_record.pairs[0]
    broken = [row.model_copy(update={"errors": ["no module is left"]}) for row in near.rows]
    one = near.adapters[0].model_copy(update={"rows": broken})
    pair = near.model_copy(update={"rows": broken, "adapters": [one, *near.adapters[1:]]})
    assert "- auto: no module is left (one)" in table.page(toy_record.model_copy(update={"pairs": [pair]}))
    # All of the adapters need no naming.
    assert "- copy: no module is left to carry\n" in table.page(toy_record)


def test_one_seed_is_said_to_leave_the_training_out(toy_record: BenchReport) -> None:
    said = "marks rest on the inputs alone"
    assert f"Where adapters have one seed: intervals and {said}" in table.legend(toy_record)
    two = toy_record.model_copy(update={"pairs": toy_record.pairs[:1]})
    assert said not in table.legend(two)


def test_a_page_for_makers_says_what_the_columns_are_and_leaves_the_trivial_out(toy_record: BenchReport) -> None:
    text = table.block(toy_record)
    assert "1 = as a LoRA trained anew on the new base" in text
    assert "*LM*: language models; *near*: the base was trained on a little" in text
    assert "| native |" in text
    assert "| empty |" not in text
    assert "| empty |" in table.page(toy_record)


def test_no_figure_reads_minus_zero() -> None:
    row = with_difference(-0.1, 0.1).model_copy(update={"recovery": Interval(mean=-0.001, low=-0.01, high=0.01)})
    assert table.recovery(row) == "0.00"


def test_the_page_carries_command_date_and_every_row(toy_record: BenchReport) -> None:
    text = table.page(toy_record)
    assert toy_record.runs[0].command in text
    assert toy_record.runs[0].date in text
    for name in table.rows_of(toy_record):
        assert f"| {name} |" in text
    assert "no module is left to carry" in text


def test_all_lines_of_a_table_have_as_many_cells(toy_record: BenchReport) -> None:
    for part in re.findall(r"(?:^\|.*\|\n)+", table.page(toy_record), re.M):
        assert len({row.count("|") for row in part.splitlines()}) == 1


def test_a_readme_is_changed_between_its_marks_alone(toy_record: BenchReport) -> None:
    text = f"before\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n"
    once = table.WRITTEN(text, toy_record)
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old\n" not in once
    assert table.WRITTEN(once, toy_record) == once
    assert table.WRITTEN("no marks", toy_record) == table.page(toy_record)


def test_goals_are_told_by_figures_or_not_at_all(toy_record: BenchReport) -> None:
    found = {goal.claim: goal.held for goal in goals(toy_record)}
    assert found["auto is never below the copy, beyond noise, in the mean over a pair's adapters"] is True
    assert found["far: maps of weights are refused before any model is run"] is True
    assert found["pruned: auto recovers at least 0.85"] is None


def test_a_goal_rests_on_no_pair_whose_figure_is_not_defined(toy_record: BenchReport) -> None:
    near = toy_record.pairs[0]
    rows = [row.model_copy(update={"versus_copy": NULL}) if row.name == "auto" else row for row in near.rows]
    record = toy_record.model_copy(update={"pairs": [near.model_copy(update={"rows": rows})]})
    (found,) = (goal for goal in goals(record) if goal.claim.startswith("near:"))
    assert (found.held, found.figures) == (None, "")
    assert "within 0.005" in found.claim


def test_the_html_page_is_whole_loads_nothing_and_shows_every_pair(toy_record: BenchReport) -> None:
    page = Page(render_bench(toy_record))
    for pair in toy_record.pairs:
        assert pair.name in page.words
        assert pair.about in page.words
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") > len(toy_record.pairs)
    assert not {"script", "link", "iframe", "img"} & {*tags}
    assert "loses to the copy" in page.words
    assert "`" not in page.words.split("What the controls are")[0]


def test_a_chart_has_a_row_for_each_method_best_first(toy_record: BenchReport) -> None:
    near = toy_record.pairs[0]
    names = [row.name for row in drawn_rows(near)]
    assert names[:3] == ["copy", "best copy", "random"]
    assert names[-1] == "lora-x half rank"
    svg = draw_pair(near)
    assert svg.count('<g class="mark">') == len(names)
    assert "NaN" not in svg


def test_a_chart_shows_names_as_text(toy_record: BenchReport) -> None:
    near = toy_record.pairs[0].model_copy(update={"name": "<script>"})
    assert "<script>" not in draw_pair(near)


def in_this_process(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The command measures the toy pairs, in no process but this."""
    monkeypatch.setattr(bench_run, "WORLDS", toyworld.FACTORY)
    grid = bench_run.run_grid
    monkeypatch.setattr(bench_run, "run_grid", lambda *args, **kwargs: grid(*args, **{**kwargs, "jobs": 0}))
    monkeypatch.setenv("REGRAFT_BENCH_CACHE", str(cache))


def test_the_verb_measures_writes_and_shows_again(
    tmp_path: Path, toy_cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch, toy_cache)
    methods = ("--methods", "auto,procrustes", "--methods", "lora-x half rank")
    out, page = tmp_path / "bench.json", tmp_path / "bench.html"
    ran = run("bench", "--pairs", "toy-near", *methods, "--resume", "--out", out, "--report", page)
    assert ran.code == 0
    assert "▼" in ran.out
    record = load(out)
    assert record.missing == 0
    assert record.runs[0].command.startswith("regraft bench --pairs toy-near --methods auto,procrustes")
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").count("<svg") > 1
    again = run("bench", "table", out, "--markdown", tmp_path / "benchmark.md", "--json")
    assert json.loads(again.out)["runs"][0]["date"] == record.runs[0].date
    assert (tmp_path / "benchmark.md").read_text(encoding="utf-8") == table.page(record)

    # A run of another pair leaves the first one's figures where they are.
    assert run("bench", "--pairs", "toy-far", *methods, "--resume", "--out", out, "--keep").code == 0
    both = load(out)
    assert [pair.name for pair in both.pairs] == ["toy-near", "toy-far"]
    assert both.pairs[0] == record.pairs[0]
    assert [run.pairs for run in both.runs] == [["toy-near"], ["toy-far"]]
    assert {name for group in both.groups for name in group.pairs} == {"toy-near", "toy-far"}
    assert "toy-far: " in table.page(both)
    # Measured again, it takes its own place, and the run that it was kept from is gone.
    assert run("bench", "--pairs", "toy-near", *methods, "--resume", "--out", out, "--keep").code == 0
    assert [run.pairs for run in load(out).runs] == [["toy-far"], ["toy-near"]]
    assert [pair.name for pair in load(out).pairs] == ["toy-near", "toy-far"]
    # One seed of one adapter, in place of the same.
    ones = ("--pairs", "toy-near", "--adapters", "one", "--seeds", "1")
    assert run("bench", *ones, *methods, "--resume", "--out", out, "--keep").code == 0
    assert load(out).pairs == both.pairs
    assert [run.pairs for run in load(out).runs] == [["toy-far"], ["toy-near"], ["toy-near"]]


def test_what_was_not_measured_yet_is_counted_and_comes_seed_by_seed(
    tmp_path: Path, toy_cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch, toy_cache)
    out, whole = tmp_path / "bench.json", tmp_path / "whole.json"
    asked = ("bench", "--pairs", "toy-near", "--methods", "procrustes", "--resume", "--keep", "--out")
    assert run(*asked, whole).code == 0
    for seed in (0, 1):
        assert run(*asked, out, "--seeds", str(seed)).code == 0
        # Eight controls and a method less "old", of two adapters.
        assert load(out).pairs[0].missing == (0 if seed else 2 * 8)
    assert load(out).pairs == load(whole).pairs


def test_a_group_that_could_not_be_made_ends_it_with_an_error_and_the_rest_is_written(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burnt(self: toyworld.ToyWorld, pair: str, name: str, seed: int) -> Path:
        if name == "one":
            raise OSError("no space left on device")
        return self._lora(pair, name, seed, toyworld.WANTED)

    in_this_process(monkeypatch, tmp_path)
    monkeypatch.setattr(toyworld.ToyWorld, "native", burnt)
    out = tmp_path / "bench.json"
    ran = run("bench", "--pairs", "toy-near", "--seeds", "0", "--methods", "procrustes", "--out", out, "-q")
    assert ran.code == 1
    assert "9 cells could not be made" in ran.err
    assert [adapter.name for adapter in load(out).pairs[0].adapters] == ["two"]


def test_nothing_can_be_kept_without_a_file(run: Run, tmp_path: Path) -> None:
    ran = run("bench", "--keep", "--cache", tmp_path)
    assert ran.code == 2
    assert "--keep needs --out" in ran.err


def test_unknown_pairs_and_seeds_are_errors_of_use(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "WORLDS", toyworld.FACTORY)
    assert run("bench", "--pairs", "nowhere", "--cache", tmp_path).code == 2
    assert run("bench", "--seeds", "first", "--cache", tmp_path).code == 2


def test_a_record_that_is_none_is_told_in_a_line(tmp_path: Path, run: Run) -> None:
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    ran = run("bench", "table", tmp_path / "x.json")
    assert ran.code == 1
    assert "BenchReport" in ran.err


def test_make_trains_what_is_missing(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "WORLDS", toyworld.FACTORY)
    ran = run("bench", "make", "--pairs", "toy-far", "--cache", tmp_path)
    assert ran.code == 0
    assert "toy-far one seed 0: there" in ran.err
    assert (tmp_path / "toy" / "toy-far-one-0" / "adapter_config.json").is_file()


def test_the_committed_pages_are_those_of_the_committed_record() -> None:
    file = ROOT / "results" / "bench.json"
    if not file.exists():
        pytest.skip("no results in this checkout")
    record = load(file)
    assert (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8") == table.page(record)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.WRITTEN(readme, record) == readme


def test_the_record_is_saved_a_row_a_line(toy_record: BenchReport, tmp_path: Path) -> None:
    save(toy_record, tmp_path / "bench.json")
    text = (tmp_path / "bench.json").read_text(encoding="utf-8")
    assert sum('"name": "procrustes"' in one for one in text.splitlines()) == 1 + 2 + 2 + 3 + 4
