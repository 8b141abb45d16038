"""What `auto` chooses, and what it never does."""

from __future__ import annotations

from pathlib import Path

import pytest

from regraft import Adapter, open_base
from regraft.carry import Settings
from regraft.methods._choosing import HeldOut, Score
from regraft.methods.task import AdapterTask, Running
from regraft.pairing import pair_bases
from regraft.port import PortResult, port
from regraft.probes.batches import make_batches
from regraft.runtime import load_model
from verify import tiny

FEW = Running(n_inputs=24)


@pytest.fixture(scope="module")
def adapter(old: Path) -> Adapter:
    return tiny.lora(load_model(old).main, ("q_proj", "v_proj", "down_proj"), size=0.3)


def chosen(adapter: Adapter, old: Path, new: Path, running: Running = FEW) -> PortResult:
    return port(adapter, open_base(old), open_base(new), settings=Settings(running=running))


def forbid_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.runtime.both.load_model", lambda *_, **__: pytest.fail("a model was loaded"))


def test_equal_bases_give_the_very_copy_and_no_model_is_loaded(
    adapter: Adapter, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_models(monkeypatch)
    result = chosen(adapter, old, old)
    assert result.report.method == "copy"
    result.save(tmp_path / "auto")
    port(adapter, open_base(old), open_base(old), "copy").save(tmp_path / "copy")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("auto", "copy"))
    assert first.read_bytes() == second.read_bytes()


def test_near_bases_load_no_model(adapter: Adapter, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = tiny.llama(tmp_path / "near", drift=0.02)
    forbid_models(monkeypatch)
    assert chosen(adapter, old, near).report.method == "copy"


def test_weights_only_loads_no_model(
    adapter: Adapter, old: Path, drifted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_models(monkeypatch)
    report = chosen(adapter, old, drifted, Running(weights_only=True)).report
    assert report.method == "copy"
    assert "--weights-only" in report.method_reason


def test_under_drift_it_takes_what_is_nearest_on_held_out_inputs(adapter: Adapter, old: Path, drifted: Path) -> None:
    report = chosen(adapter, old, drifted).report
    assert report.method in ("effect", "scaled-copy")
    assert report.figures["held_out"] < report.figures["copy_held_out"]
    assert "held-out" in report.method_reason


def test_it_takes_a_wider_file_where_that_pays_and_none_where_the_rank_is_given(
    adapter: Adapter, old: Path, drifted: Path
) -> None:
    free = chosen(adapter, old, drifted)
    assert {update.rank for update in free.adapter.updates.values()} in ({2}, {8})
    bound = port(adapter, open_base(old), open_base(drifted), settings=Settings(running=FEW, rank=2))
    assert {update.rank for update in bound.adapter.updates.values()} == {2}


def test_what_is_no_better_on_held_out_inputs_is_not_taken(
    adapter: Adapter, old: Path, drifted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOut, "score", lambda *_: Score(1.0, 1.0))
    report = chosen(adapter, old, drifted).report
    assert report.method == "copy"
    assert "nothing was better" in report.method_reason


def test_bases_that_can_not_be_run_give_a_copy_and_the_reason(adapter: Adapter, old: Path, drifted: Path) -> None:
    weights = (drifted / "model.safetensors").rename(drifted.parent / "bare.safetensors")
    try:
        report = chosen(adapter, old, weights).report
    finally:
        weights.rename(drifted / "model.safetensors")
    assert report.method == "copy"
    assert "can't be run" in report.method_reason


def test_across_tokenizers_texts_are_weighed_by_the_likelihoods_of_the_same_characters(
    adapter: Adapter, numbered: tuple[Path, Path]
) -> None:
    bases = open_base(numbered[0]), open_base(numbered[1])
    task = AdapterTask(adapter, *bases, pair_bases(*bases), adapter.updates, lambda: adapter, Running(n_inputs=8))
    held = HeldOut(task, make_batches(task.models, adapter, 8).held_out)
    assert held.by_text
    assert held.score({}).task == pytest.approx(1.0)
    # Only the rows of the embeddings were moved: the copy is the teacher.
    assert held.score(adapter.updates).task == pytest.approx(0.0, abs=1e-4)
