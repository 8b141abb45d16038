from __future__ import annotations

from pathlib import Path

import pytest
from running import Run

from regraft import load_adapter
from regraft.report.json_schema import parse
from regraft.report.ops_schema import ExtractReport
from toys import drifted, llama, save_base


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    state = llama()
    save_base(state, tmp_path / "old.safetensors")
    save_base(drifted(state, 0.1), tmp_path / "new.safetensors")
    return tmp_path


PAIR = ("--base", "old.safetensors", "--tuned", "new.safetensors")


def test_the_adapter_and_the_record_are_written(here: Path, run: Run) -> None:
    ran = run("extract", *PAIR, "-o", "out", "--rank", "3", "--exclude", "*embed*", "--json")
    assert ran.code == 0
    report = parse(ExtractReport, ran.out)
    adapter = load_adapter("out")
    assert report.format == adapter.format == "peft"
    assert len(adapter.updates) == len(report.modules) == 22
    assert {update.rank for update in adapter.updates.values()} == {3}
    assert all(row.change == pytest.approx(0.1, rel=1e-3) for row in report.modules)


def test_the_table_counts_what_is_held_and_what_is_unchanged(here: Path, run: Run) -> None:
    out = run("extract", *PAIR, "-o", "out", "--energy", "0.5").out
    assert "23 changed parameters, 4 unchanged" in out


def test_a_size_must_be_asked_for(here: Path, run: Run) -> None:
    ran = run("extract", *PAIR, "-o", "out")
    assert ran.code == 2
    assert "--rank 32" in ran.err


def test_a_missing_checkpoint_is_an_input_error(here: Path, run: Run) -> None:
    ran = run("extract", "--base", "none", "--tuned", "new.safetensors", "-o", "out", "--rank", "2")
    assert ran.code == 1
    assert "none: no such file or folder" in ran.err


def test_the_same_checkpoint_twice_has_nothing_to_extract(here: Path, run: Run) -> None:
    ran = run("extract", "--base", "old.safetensors", "--tuned", "old.safetensors", "-o", "out", "--rank", "2")
    assert ran.code == 1
    assert "nothing to extract" in ran.err
    assert not (here / "out").exists()
