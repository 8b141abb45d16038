"""One adapter for a base with two experts (Wan 2.2): a file for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from running import Run
from safetensors.torch import load_file, save_file

import regraft.cli.port
from regraft import load_adapter, open_base
from regraft.errors import InputError
from regraft.experts import experts
from regraft.report.json_schema import parse
from regraft.report.schema import PortReport

MODULE = "transformer.blocks.0.attn1.to_q"


def wan(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1
    )


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    """An old base, and a new one whose two experts are the old transformer, trained on a little."""
    model, old, new = wan(0), tmp_path / "wan21", tmp_path / "wan22"
    model.save_pretrained(old / "transformer")
    for name, amount in (("transformer", 0.02), ("transformer_2", 0.01)):
        expert = wan(0)
        for value in expert.parameters():
            value.data += amount * value.data.std().nan_to_num() * torch.randn_like(value)
        expert.save_pretrained(new / name)
    return old, new


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "style.safetensors"
    save_file({f"{MODULE}.lora_A.weight": torch.randn(4, 24), f"{MODULE}.lora_B.weight": torch.randn(24, 4)}, path)
    return path


def test_each_expert_gets_a_file_of_its_own(bases: tuple[Path, Path], adapter: Path, tmp_path: Path, run: Run) -> None:
    old, new = map(str, bases)
    ran = run("port", str(adapter), "--from", old, "--to", new, "-o", str(tmp_path / "out.safetensors"))
    assert ran.code == 0, ran.err
    assert not (tmp_path / "out.safetensors").exists()
    for expert in ("high_noise", "low_noise"):
        assert load_file(tmp_path / f"out_{expert}.safetensors").keys() == load_file(adapter).keys()
        # The terminal breaks long paths.
        assert f"out_{expert}.safetensors" in "".join(ran.out.split())


@pytest.mark.parametrize("wanted", [(), ("--dry-run",)])
def test_the_records_of_both_experts_are_one_json_document(
    bases: tuple[Path, Path], adapter: Path, tmp_path: Path, run: Run, wanted: tuple[str, ...]
) -> None:
    old, new = map(str, bases)
    ran = run("port", adapter, "--from", old, "--to", new, "-o", tmp_path / "out.safetensors", "--json", *wanted)
    assert ran.code == 0, ran.err
    records = json.loads(ran.out)
    if wanted:
        assert [record["verdict"] for record in records] == ["survives", "survives"]
        return
    files = [tmp_path / f"out_{expert}.safetensors" for expert in ("high_noise", "low_noise")]
    assert [record["outputs"] for record in records] == [[str(file)] for file in files]
    assert all(parse(PortReport, json.dumps(record)).counts.ported == 1 for record in records)


def test_what_was_written_is_told_where_the_other_expert_fails(
    bases: tuple[Path, Path], adapter: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_on_the_second(*arguments: Any, **options: Any) -> Any:
        if (tmp_path / "out_high_noise.safetensors").exists():
            raise InputError("is damaged")
        return fit_for(*arguments, **options)

    fit_for = regraft.cli.port.fit_for
    monkeypatch.setattr("regraft.cli.port.fit_for", fails_on_the_second)
    old, new = map(str, bases)
    ran = run("port", adapter, "--from", old, "--to", new, "-o", tmp_path / "out.safetensors", "--json")
    assert (ran.code, ran.err) == (1, "regraft: is damaged\n")
    assert [record["outputs"] for record in json.loads(ran.out)] == [[str(tmp_path / "out_high_noise.safetensors")]]


def test_an_expert_is_judged_by_its_own_weights(bases: tuple[Path, Path], adapter: Path) -> None:
    old, new = map(open_base, bases)
    found = experts(load_adapter(adapter), old, new)
    weights = {
        label: base.components["transformer"]["blocks.0.attn1.to_q.weight"].load() for label, base in found.items()
    }
    for label, name in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
        expected = new.components[name]["blocks.0.attn1.to_q.weight"].load()
        assert torch.equal(weights[label], expected)


def test_nothing_is_written_where_one_of_the_files_is_there(
    bases: tuple[Path, Path], adapter: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "out_low_noise.safetensors").write_bytes(b"mine")
    old, new = map(str, bases)
    ran = run("port", str(adapter), "--from", old, "--to", new, "-o", str(tmp_path / "out.safetensors"))
    assert ran.code == 1
    assert "out_low_noise.safetensors: exists already" in ran.err
    assert not (tmp_path / "out_high_noise.safetensors").exists()


def test_an_adapter_of_both_experts_is_ported_as_one(bases: tuple[Path, Path], tmp_path: Path) -> None:
    pair = {f"{MODULE}.lora_A.weight": torch.randn(4, 24), f"{MODULE}.lora_B.weight": torch.randn(24, 4)}
    path = tmp_path / "both.safetensors"
    low = {key.replace("transformer.", "transformer_2."): value.clone() for key, value in pair.items()}
    save_file(pair | low, path)
    assert experts(load_adapter(path), None, open_base(bases[1])) == {}
