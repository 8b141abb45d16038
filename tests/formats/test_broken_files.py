"""Files that can't be what they claim: each error names the file, the key, and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from regraft import InputError, load_adapter
from regraft.formats._common import check_values

PATH = "down_blocks.0.attentions.0.proj_in"
FLAT = f"lora_unet_{PATH.replace('.', '_')}"
# Format → keys of (up, down) of one module.
KEYS = {
    "peft": (f"base_model.model.{PATH}.lora_B.weight", f"base_model.model.{PATH}.lora_A.weight"),
    "diffusers": (f"unet.{PATH}.lora_B.weight", f"unet.{PATH}.lora_A.weight"),
    "diffusers, older": (f"unet.{PATH}.lora.up.weight", f"unet.{PATH}.lora.down.weight"),
    "kohya": (f"{FLAT}.lora_up.weight", f"{FLAT}.lora_down.weight"),
    "cloneofsimo": ("unet:0:up", "unet:0:down"),
}


def write(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file(dict(tensors), path, metadata=metadata or None)
    return path


@pytest.mark.parametrize("format", KEYS)
@pytest.mark.parametrize("missing", [0, 1], ids=["no up", "no down"])
def test_half_of_a_pair_is_named(format: str, missing: int, tmp_path: Path) -> None:
    up, down = torch.ones(8, 2), torch.ones(2, 8)
    pair = dict(zip(KEYS[format], (up, down), strict=True))
    lost, kept = KEYS[format][missing], KEYS[format][1 - missing]
    del pair[lost]
    with pytest.raises(InputError) as error:
        load_adapter(write(tmp_path / "half.safetensors", pair))
    assert error.value.key == kept
    assert f"no matching {('up', 'down')[missing]}" in str(error.value)
    assert "half.safetensors" in str(error.value)
    assert error.value.remedy


@pytest.mark.parametrize("format", KEYS)
@pytest.mark.parametrize(
    ("up", "down", "says"),
    [
        (torch.ones(8, 3), torch.ones(2, 8), "rank mismatch"),
        (torch.ones(8, 0), torch.ones(0, 8), "empty"),
        (torch.ones(8), torch.ones(2, 8), "shape"),
        (torch.ones(8, 2, 3, 3), torch.ones(2, 8, 3, 3), "1 × 1"),
        (torch.ones(8, 2, dtype=torch.int8), torch.ones(2, 8), "int8"),
    ],
    ids=["ranks differ", "rank 0", "vector", "up is 3 × 3", "integers"],
)
def test_a_pair_that_can_not_be_multiplied_is_named(
    format: str, up: Tensor, down: Tensor, says: str, tmp_path: Path
) -> None:
    pair = dict(zip(KEYS[format], (up, down), strict=True))
    with pytest.raises(InputError, match=says) as error:
        load_adapter(write(tmp_path / "broken.safetensors", pair))
    assert error.value.key == KEYS[format][0]
    assert error.value.file == tmp_path / "broken.safetensors"
    assert error.value.remedy


@pytest.mark.parametrize(
    ("alpha", "says"),
    [(torch.ones(2), r"shape \[2\]"), (torch.tensor(float("nan")), "NaN or Inf")],
)
def test_a_broken_alpha_is_named(alpha: Tensor, says: str, tmp_path: Path) -> None:
    for keys, key in ((KEYS["kohya"], f"{FLAT}.alpha"), (KEYS["diffusers"], f"unet.{PATH}.alpha")):
        tensors = {keys[0]: torch.ones(8, 2), keys[1]: torch.ones(2, 8), key: alpha}
        with pytest.raises(InputError, match=says) as error:
            load_adapter(write(tmp_path / "alpha.safetensors", tensors))
        assert error.value.key == key


def test_two_spellings_of_one_module_contradict_each_other(tmp_path: Path) -> None:
    keys = (*KEYS["diffusers"], *KEYS["diffusers, older"])
    halves = (torch.ones(8, 2), torch.ones(2, 8), torch.zeros(8, 2), torch.zeros(2, 8))
    with pytest.raises(InputError, match="second"):
        load_adapter(write(tmp_path / "two.safetensors", dict(zip(keys, halves, strict=True))))


def peft(folder: Path, config: str | dict[str, Any]) -> Path:
    folder.mkdir()
    pair = dict(zip(KEYS["peft"], (torch.ones(8, 2), torch.ones(2, 8)), strict=True))
    write(folder / "adapter_model.safetensors", pair)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text)
    return folder


GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["proj_in"]}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{not json", "can't be read"),
        ("[1, 2]", "not a JSON object"),
        ({**GOOD, "r": None}, "r: is missing"),
        ({**GOOD, "r": "two"}, "r: must be a number"),
        ({**GOOD, "lora_alpha": None}, "lora_alpha: is missing"),
        ({**GOOD, "alpha_pattern": [1]}, "alpha_pattern: must map"),
        ({**GOOD, "alpha_pattern": {"proj_in": "x"}}, "alpha_pattern: 'proj_in' must have a number"),
        ({**GOOD, "rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is no regular expression"),
    ],
)
def test_a_config_without_what_the_scale_needs_is_named(
    config: str | dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"adapter_config.json.*{says}"):
        load_adapter(peft(tmp_path / "adapter", config))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        ('{"unet.r": 2}', "unet.lora_alpha: is missing"),
    ],
)
def test_broken_diffusers_metadata_is_named(text: str, says: str, tmp_path: Path) -> None:
    pair = dict(zip(KEYS["diffusers"], (torch.ones(8, 2), torch.ones(2, 8)), strict=True))
    with pytest.raises(InputError, match=f"lora_adapter_metadata.*{says}"):
        load_adapter(write(tmp_path / "meta.safetensors", pair, lora_adapter_metadata=text))


@pytest.mark.parametrize("format", KEYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_found_when_asked_for(format: str, value: float, tmp_path: Path) -> None:
    up, down = torch.ones(8, 2), torch.ones(2, 8)
    down[1, 3] = value
    pair = dict(zip(KEYS[format], (up, down), strict=True))
    adapter = load_adapter(write(tmp_path / "nan.safetensors", pair))
    with pytest.raises(InputError, match="NaN or Inf") as error:
        check_values(adapter)
    assert error.value.key == KEYS[format][1]


def test_keys_of_other_methods_are_listed_not_guessed(tmp_path: Path) -> None:
    tensors = {
        f"{FLAT}.vera_lambda_b": torch.ones(8),
        f"{FLAT}.alpha": torch.tensor(1.0),
        "lora_unet_no_such_module.lora_up.weight": torch.ones(8, 2),
        "lora_unet_no_such_module.lora_down.weight": torch.ones(2, 8),
    }
    adapter = load_adapter(write(tmp_path / "other.safetensors", tensors))
    assert dict(adapter.updates) == {}
    assert set(adapter.unrecognised) == set(tensors)
    peft_keys = {f"base_model.model.x.{name}": torch.ones(2, 2) for name in ("randlora_gamma", "lora_E")}
    adapter = load_adapter(write(tmp_path / "peft.safetensors", peft_keys))
    assert set(adapter.unrecognised) == set(peft_keys)
