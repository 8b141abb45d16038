from __future__ import annotations

from pathlib import Path

import pytest
from running import Run

from regraft.report.json_schema import parse
from regraft.report.ops_schema import DiffReport
from toys import llama, lora


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lora(llama(), seed=1).save(tmp_path / "one")
    lora(llama(), seed=2, rank=2, roles=("q_proj", "o_proj")).save(tmp_path / "two")
    return tmp_path


def test_the_record_has_both_sides(here: Path, run: Run) -> None:
    ran = run("diff", "one", "two", "--json")
    assert ran.code == 0
    report = parse(DiffReport, ran.out)
    assert [row.ranks for row in report.modules] == [(4, 2)] * 3
    assert (len(report.only_first), len(report.only_second)) == (6, 3)


def test_the_table_puts_what_differs_most_first(here: Path, run: Run) -> None:
    out = run("diff", "one", "two").out
    assert "only in one: 6" in out
    assert "3 modules in both, 0 of them equal" in out
    report = parse(DiffReport, run("diff", "one", "two", "--json").out)
    first = report.modules[0].name
    assert out.index(first) < out.index(report.modules[-1].name)


def test_an_adapter_equals_itself(here: Path, run: Run) -> None:
    assert "9 modules in both, 9 of them equal" in run("diff", "one", "one").out


def test_a_missing_file_is_an_input_error(here: Path, run: Run) -> None:
    assert run("diff", "one", "none").code == 1
