"""Hashes in metadata are those that sd-scripts' own functions give."""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import DTYPES, golden
from safetensors.torch import load_file, save_file

from regraft import load_adapter
from regraft.formats._hashes import with_true_hashes
from regraft.tensor_files import read_safetensors

VECTORS: list[dict[str, Any]] = golden("hash-vectors")["vectors"]


def tensors_of(vector: dict[str, Any]) -> dict[str, torch.Tensor]:
    made = {}
    for key, about in vector["tensors"].items():
        values = torch.arange(prod(about["shape"])).reshape(about["shape"])
        made[key] = (torch.tensor(4.0) if key.endswith(".alpha") else values).to(DTYPES[about["dtype"]])
    return made


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_the_hashes_agree_with_sd_scripts(vector: dict[str, Any]) -> None:
    stale = {"sshs_model_hash": "old", "sshs_legacy_hash": "old"}
    result = with_true_hashes(vector["metadata"] | stale, tensors_of(vector))
    assert {key: result[key] for key in stale} == {key: vector[key] for key in stale}
    assert with_true_hashes(vector["metadata"], tensors_of(vector)) == vector["metadata"]


def test_a_written_file_has_the_hashes_of_its_own_tensors(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {f"{stem}.lora_down.weight": torch.ones(4, 320), f"{stem}.lora_up.weight": torch.ones(320, 4)}
    metadata = {"ss_v2": "False", "sshs_model_hash": "old", "modelspec.hash_sha256": "0xold"}
    save_file(tensors, tmp_path / "in.safetensors", metadata=metadata)
    load_adapter(tmp_path / "in.safetensors").save(tmp_path / "out.safetensors")
    written = read_safetensors(tmp_path / "out.safetensors").metadata
    raw = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(load_file(tmp_path / "in.safetensors").items()))
    assert written["modelspec.hash_sha256"] == f"0x{hashlib.sha256(raw).hexdigest()}"
    assert len(written["sshs_model_hash"]) == 64
    assert "sshs_legacy_hash" not in written

    load_adapter(tmp_path / "out.safetensors").save(tmp_path / "other.safetensors", format="diffusers")
    assert not [key for key in read_safetensors(tmp_path / "other.safetensors").metadata if "hash" in key]
