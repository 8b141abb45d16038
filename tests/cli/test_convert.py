"""``regraft convert``: another format, the same adapter, or a reason why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from regraft import InputError, OutputError, UsageError
from regraft.cli import app

REAL = Path(__file__).parents[1] / "data" / "analog_svd_rank4.safetensors"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_says_what_was_written(tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    record = json.loads(run(REAL, "-o", target, "--format", "kohya", "--json"))
    assert (record["input"], record["output"]) == (str(REAL), str(target))
    assert (record["format"], record["modules"], record["changes"]) == ("kohya", 192, [])
    assert len(load_file(target)) == 3 * 192


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run(REAL, "-o", target, "--format", "kohya")
    assert target.read_text() == "mine"
    assert run(REAL, "-o", target, "--format", "kohya", "--overwrite", "--quiet") == ""
    assert load_file(target)


def test_an_unknown_format_is_a_usage_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cloneofsimo, .*diffusers, .*kohya, .*peft"):
        run(REAL, "-o", tmp_path / "out", "--format", "onnx")


def test_the_base_gives_names_that_no_table_has(tmp_path: Path) -> None:
    stem = "lora_unet_inner_part_to_q"
    pair = {f"{stem}.lora_up.weight": torch.ones(8, 2), f"{stem}.lora_down.weight": torch.ones(2, 8)}
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(pair, source)
    with pytest.raises(OutputError, match="--base"):
        run(source, "-o", target, "--format", "diffusers")
    assert not target.exists()

    (tmp_path / "base" / "unet").mkdir(parents=True)
    weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({"inner.part.to_q.weight": torch.ones(8, 8)}, weights)
    run(source, "-o", target, "--format", "diffusers", "--base", tmp_path / "base")
    assert set(load_file(target)) == {"unet.inner.part.to_q.lora_A.weight", "unet.inner.part.to_q.lora_B.weight"}


def test_a_peft_folder_becomes_a_bare_file_and_a_folder_again(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    keys = ("base_model.model.x.lora_B.weight", "base_model.model.x.lora_A.weight")
    save_file({keys[0]: torch.ones(8, 4), keys[1]: torch.ones(4, 8)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    run(folder, "-o", tmp_path / "bare.safetensors", "--format", "peft")
    # The bare file has no alpha: the factor 8 / 4 is in B.
    assert torch.equal(load_file(tmp_path / "bare.safetensors")[keys[0]], torch.full((8, 4), 2.0))
    run(tmp_path / "bare.safetensors", "-o", tmp_path / "again", "--format", "peft")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 4, ["x"])


def test_a_file_that_is_missing_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.safetensors: no such file"):
        run(tmp_path / "none.safetensors", "-o", tmp_path / "out", "--format", "kohya")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", ["kohya", "diffusers", "cloneofsimo"])
def test_values_that_are_no_numbers_are_not_written(format: str, value: float, tmp_path: Path) -> None:
    tensors = load_file(REAL)
    tensors["unet:7:up"][0, 0] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=r"bad\.safetensors: unet:7:up: holds NaN or Inf"):
        run(tmp_path / "bad.safetensors", "-o", tmp_path / "out.safetensors", "--format", format)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_a_folder_around_the_input_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(load_file(REAL), folder / "in.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"holds the input in\.safetensors"):
        run(folder / "in.safetensors", "-o", folder, "--format", "kohya", "--overwrite")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "in.safetensors"}


def _dora(path: Path) -> Path:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{stem}.lora_up.weight": torch.ones(320, 2),
        f"{stem}.lora_down.weight": torch.ones(2, 320),
        f"{stem}.alpha": torch.tensor(1.0),
        f"{stem}.dora_scale": torch.ones(1, 320),
    }
    metadata = {"ss_output_name": "secret", "ss_base_model_version": "sd_v1", "ss_tag_frequency": "{}"}
    save_file(tensors, path, metadata=metadata)
    return path


def test_the_dry_run_shows_the_loss_and_writes_nothing(tmp_path: Path) -> None:
    source = _dora(tmp_path / "in.safetensors")
    record = json.loads(run(source, "--format", "peft", "--dry-run", "--json"))
    assert [row["status"] for row in record["changes"]] == ["lost"]
    assert "per input column" in record["changes"][0]["reason"]
    assert "nothing was written" in run(source, "--format", "peft", "--dry-run")
    with pytest.raises(OutputError, match=r"a dora would be lost: .*per input column.*--base"):
        run(source, "-o", tmp_path / "out", "--format", "peft")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_what_is_private_is_left_out_and_listed(tmp_path: Path) -> None:
    source = _dora(tmp_path / "in.safetensors")
    told = run(source, "-o", tmp_path / "out.safetensors", "--format", "kohya", "--strip-private", "--json")
    assert json.loads(told)["removed"] == ["ss_output_name", "ss_tag_frequency"]
    raw = (tmp_path / "out.safetensors").read_bytes()
    assert b"secret" not in raw
    assert b"sd_v1" in raw


def test_no_output_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--output is missing"):
        run(REAL, "--format", "kohya")
