from __future__ import annotations

from pathlib import Path

import pytest
from running import Run
from safetensors.torch import load_file

from regraft.report.json_schema import parse
from regraft.report.ops_schema import ResizeReport
from toys import llama, lora


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lora(llama()).save(tmp_path / "lora")
    return tmp_path


def test_the_record_has_every_module_and_the_file_the_rank(here: Path, run: Run) -> None:
    ran = run("resize", "lora", "-o", "out", "--rank", "2", "--json")
    assert ran.code == 0
    report = parse(ResizeReport, ran.out)
    assert [row.rank_out for row in report.modules] == [2] * 9
    assert 0 < report.energy_kept < 1
    assert {min(tensor.shape) for tensor in load_file(here / "out" / "adapter_model.safetensors").values()} == {2}


def test_per_module_sizes_are_globs(here: Path, run: Run) -> None:
    ran = run("resize", "lora", "-o", "out", "--per-module", "*q_proj=1,*layers.2*=0.5", "--json")
    ranks = {row.name: row.rank_out for row in parse(ResizeReport, ran.out).modules}
    assert ranks["model.layers.0.self_attn.q_proj"] == 1
    assert ranks["model.layers.0.self_attn.v_proj"] == 4
    assert ranks["model.layers.2.mlp.down_proj"] in (1, 2)


def test_the_table_tells_rank_and_share(here: Path, run: Run) -> None:
    out = run("resize", "lora", "-o", "out", "--rank", "2").out
    assert "4 → 2" in out
    assert "of ‖ΔW‖² kept" in out
    assert "alpha follows its rank" in out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "no size is asked for"),
        (("--rank", "0"), "--rank"),
        (("--energy", "2"), "no share"),
        (("--per-module", "q_proj"), "can't be read"),
        (("--per-module", "q_proj=many"), "neither a rank nor a share"),
        (("--rank", "2", "--format", "onnx"), "Known formats"),
    ],
)
def test_a_wrong_size_is_a_usage_error(here: Path, run: Run, flags: tuple[str, ...], told: str) -> None:
    ran = run("resize", "lora", "-o", "out", *flags)
    assert ran.code == 2
    assert told in ran.err
    assert not (here / "out").exists()


def test_what_is_there_is_kept_unless_told(here: Path, run: Run) -> None:
    (here / "out.safetensors").write_text("mine")
    ran = run("resize", "lora", "-o", "out.safetensors", "--rank", "2")
    assert ran.code == 1
    assert (here / "out.safetensors").read_text() == "mine"
    assert run("resize", "lora", "-o", "out.safetensors", "--rank", "2", "--overwrite", "-q").out == ""
    assert load_file(here / "out.safetensors")
