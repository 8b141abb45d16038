"""``regraft inspect``: the record, the table, and no factor read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import regraft.tensor_files
import regraft.tensors
from regraft import load_adapter
from regraft.cli import app
from regraft.formats._common import check_values
from regraft.inspection import inspect_adapter

REAL = Path(__file__).parents[1] / "data" / "analog_svd_rank4.safetensors"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["inspect", *arguments], catch_exceptions=False, env={"COLUMNS": "120"})
    assert result.exit_code == 0
    return result.stdout


def test_json_is_the_record() -> None:
    record = json.loads(run(str(REAL), "--json"))
    assert record == json.loads(inspect_adapter(REAL).to_json())
    assert record["components"]["unet"] == {"modules": 144, "kinds": {"lora": 144}, "ranks": [4], "alphas": []}
    assert record["tokens"] == {}


def test_the_table_names_format_family_and_components() -> None:
    text = run(str(REAL))
    assert "cloneofsimo" in text
    assert "sd15 (Stable Diffusion 1.x)" in text
    assert ["unet", "144", "144", "lora", "4", "–"] in [line.split() for line in text.splitlines()]


def test_quiet_prints_nothing() -> None:
    assert run(str(REAL), "--quiet") == ""


class Watched:
    """An open safetensors file that notes the names of the tensors whose values are read."""

    def __init__(self, handle: Any, read: list[str]) -> None:
        self.handle, self.read = handle, read

    def __enter__(self) -> Watched:
        self.handle.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return self.handle.get_tensor(name)

    def get_slice(self, name: str) -> WatchedSlice:
        return WatchedSlice(self.handle.get_slice(name), name, self.read)


class WatchedSlice:
    """Of such a file: shape and dtype are the header's, only an index reads values."""

    def __init__(self, part: Any, name: str, read: list[str]) -> None:
        self.get_shape, self.get_dtype = part.get_shape, part.get_dtype
        self.part, self.name, self.read = part, name, read

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.read.append(self.name)
        return self.part[index]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that any module of regraft reads, by whatever way, in their order."""
    names: list[str] = []
    opened = 0

    def watched(*args: Any, **kwargs: Any) -> Watched:
        nonlocal opened
        opened += 1
        return Watched(safe_open(*args, **kwargs), names)

    modules = [module for name, module in sys.modules.items() if name.startswith("regraft")]
    for module in modules:
        if getattr(module, "safe_open", None) is safe_open:
            monkeypatch.setattr(module, "safe_open", watched)
    by_offset = regraft.tensors.Stored._read

    def noted(ref: regraft.tensors.Stored, parts: Any) -> torch.Tensor:
        names.append(ref.name)
        return by_offset(ref, parts)

    monkeypatch.setattr(regraft.tensors.Stored, "_read", noted)
    regraft.tensor_files.read_safetensors(REAL)
    assert opened == 1, "the watch sees no file"
    return names


def test_no_factor_is_read(read: list[str]) -> None:
    assert inspect_adapter(REAL).components["unet"].modules == 144
    assert read == []
    # The watch would have seen it.
    check_values(load_adapter(REAL))
    assert len(read) >= 2 * 192


def test_only_the_alphas_of_a_file_that_has_them_are_read(read: list[str], tmp_path: Path) -> None:
    load_adapter(REAL).save(tmp_path / "kohya.safetensors", format="kohya")
    read.clear()
    assert inspect_adapter(tmp_path / "kohya.safetensors").components["unet"].alphas == [4.0]
    assert read
    assert all(name.endswith(".alpha") for name in read)


def test_alphas_come_from_tensors_or_the_config(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    pair = {f"{stem}.lora_up.weight": torch.ones(320, 4, 1, 1), f"{stem}.lora_down.weight": torch.ones(4, 320, 1, 1)}
    save_file(pair | {f"{stem}.alpha": torch.tensor(2.0)}, tmp_path / "kohya.safetensors")
    assert inspect_adapter(tmp_path / "kohya.safetensors").components["unet"].alphas == [2.0]

    keys = ("base_model.model.x.lora_B.weight", "base_model.model.x.lora_A.weight")
    (tmp_path / "peft").mkdir()
    bare = {keys[0]: torch.ones(8, 4), keys[1]: torch.ones(4, 8)}
    save_file(bare, tmp_path / "peft" / "adapter_model.safetensors")
    assert inspect_adapter(tmp_path / "peft").components["model"].alphas == []
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    assert inspect_adapter(tmp_path / "peft").components["model"].alphas == [6.0]


def test_keys_that_are_not_understood_are_counted_and_shown(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{stem}.magic_{i}": torch.ones(2, 2) for i in range(8)}, tmp_path / "magic.safetensors")
    text = run(str(tmp_path / "magic.safetensors"))
    assert "8 keys not understood" in text
    assert f"{stem}.magic_0" in text
    assert "and 3 more" in text
    assert "not recognised" in text
