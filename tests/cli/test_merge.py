from __future__ import annotations

from pathlib import Path

import pytest
from running import Run

from regraft import load_adapter
from regraft.report.json_schema import parse
from regraft.report.ops_schema import MergeReport
from toys import deltas, llama, lora, relative_error


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lora(llama(), seed=1).save(tmp_path / "one")
    lora(llama(), seed=2, rank=3).save(tmp_path / "two")
    lora(llama(), seed=2, dora=True).save(tmp_path / "dora")
    return tmp_path


def test_the_weighted_sum_is_written(here: Path, run: Run) -> None:
    ran = run("merge", "one", "two", "-o", "out", "--weights", "0.8,-0.5", "--json")
    assert ran.code == 0
    report = parse(MergeReport, ran.out)
    assert report.weights == [0.8, -0.5]
    assert {(row.how, row.rank_out) for row in report.modules} == {("concatenated", 7)}
    one, two, merged = (deltas(load_adapter(name)) for name in ("one", "two", "out"))
    for ref, delta in merged.items():
        assert relative_error(delta, 0.8 * one[ref] - 0.5 * two[ref]) < 1e-5


def test_svd_cuts_to_the_rank_and_says_what_it_kept(here: Path, run: Run) -> None:
    ran = run("merge", "one", "two", "-o", "out", "--how", "svd", "--rank", "2", "--json")
    rows = parse(MergeReport, ran.out).modules
    assert all(row.rank_out == 2 and row.energy_kept is not None and 0 < row.energy_kept < 1 for row in rows)


def test_the_table_names_inputs_and_weights(here: Path, run: Run) -> None:
    out = run("merge", "one", "two", "-o", "out").out
    assert "1 · one" in out
    assert "0+1" in out
    assert "4+3 → 7" in out


def test_dora_without_its_base_is_refused_with_the_remedy(here: Path, run: Run) -> None:
    ran = run("merge", "one", "dora", "-o", "out")
    assert ran.code == 3
    assert "--base" in ran.err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--weights", "1"), "does not fit 2 adapters"),
        (("--weights", "1,x"), "can't be read"),
        (("--weights", "1,inf"), "is no number"),
        (("--how", "ties"), "Known: concat, svd"),
        (("--rank", "4"), "--how svd"),
    ],
)
def test_a_wrong_option_is_a_usage_error(here: Path, run: Run, flags: tuple[str, ...], told: str) -> None:
    ran = run("merge", "one", "two", "-o", "out", *flags)
    assert ran.code == 2
    assert told in ran.err


def test_one_alone_is_nothing_to_merge(here: Path, run: Run) -> None:
    assert run("merge", "one", "-o", "out").code == 2
