"""``regraft fingerprint``: one base told, two compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import Run

from regraft.fingerprint import Fingerprint
from toys import drifted, llama, lora, save_base


@pytest.fixture
def bases(tmp_path: Path) -> dict[str, Path]:
    state = llama(layers=4, width=64)
    made = {"v1": state, "half": {name: t.half() for name, t in state.items()}, "v2": drifted(state, 0.1)}
    return {name: save_base(tensors, tmp_path / f"{name}.safetensors") for name, tensors in made.items()}


def test_the_json_is_the_fingerprint_that_the_specification_defines(bases: dict[str, Path], run: Run) -> None:
    record = run("fingerprint", bases["v1"], "--json").record
    assert record["fingerprint"].startswith("v1:")
    assert record["prints"]["components"]["model"]["sketch"] is None
    assert record["prints"]["components"]["model"]["content"] is None
    full = run("fingerprint", bases["v1"], "--json", "--sketch", "--exact").record
    assert str(Fingerprint.from_json(json.loads(json.dumps(full["prints"])))) == record["fingerprint"]
    assert len(full["prints"]["components"]["model"]["content"]) == 64
    assert full["brief"] == record["brief"]


def test_two_bases_are_told_apart_or_known_again(bases: dict[str, Path], run: Run) -> None:
    same = run("fingerprint", bases["v1"], bases["half"], "--json").record["other"]["components"]["model"]
    assert same["verdict"] == "same"
    other = run("fingerprint", bases["v1"], bases["v2"], "--json").record["other"]["components"]["model"]
    assert other["verdict"] == "drifted"
    assert other["drift"] == pytest.approx(0.1, rel=0.15)
    assert "another version, drift" in run("fingerprint", bases["v1"], bases["v2"]).out
    assert "the same weights, by hash" in run("fingerprint", bases["v1"], bases["v1"], "--exact").out


def test_the_table_names_components_and_quiet_is_quiet(bases: dict[str, Path], run: Run) -> None:
    assert "model" in run("fingerprint", bases["v1"]).out
    assert "content" in run("fingerprint", bases["v1"], "--exact").out
    assert run("fingerprint", bases["v1"], "--quiet").out == ""


def test_an_adapter_is_told_to_be_one(tmp_path: Path, run: Run) -> None:
    lora(llama()).save(tmp_path / "lora")
    for path in (tmp_path / "lora", tmp_path / "lora" / "adapter_model.safetensors"):
        ran = run("fingerprint", path)
        assert ran.code == 1
        assert "is an adapter, and a fingerprint is that of a base" in ran.err
