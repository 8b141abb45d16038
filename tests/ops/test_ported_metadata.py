"""A port leaves a header that is true for the new base, with hashes that the tools find true."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters_made import UNET, noise, unet_lora
from running import Run
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from regraft.report.json_schema import parse
from regraft.report.schema import PortReport

HEADER = {
    "ss_sd_model_name": "old.safetensors",
    "ss_new_sd_model_hash": "1" * 64,
    "ss_output_name": "jane",
    "ss_seed": "42",
    "ss_network_dim": "6",
    "ss_network_alpha": "3.0",
    "sshs_model_hash": "2" * 64,
    "sshs_legacy_hash": "3" * 8,
    "modelspec.hash_sha256": "0x" + "4" * 64,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kohya LoRA, and two versions of the modules that it changes."""
    monkeypatch.chdir(tmp_path)
    for name, drift in (("old", 0.0), ("new", 0.02)):
        weights = {
            f"{path}.weight": noise(*shape, seed=i) + drift * noise(*shape, seed=50 + i)
            for i, (path, shape) in enumerate(UNET.items())
        }
        (tmp_path / name / "unet").mkdir(parents=True)
        save_file(weights, tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
        (tmp_path / name / "model_index.json").write_text("{}")
    replace(unet_lora(), metadata=HEADER).save(tmp_path / "lora.safetensors")
    return tmp_path


def _header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def test_the_header_names_the_new_base_and_its_own_hashes(here: Path, run: Run) -> None:
    ran = run("port", "lora.safetensors", "--from", "old", "--to", "new", "-o", "out.safetensors", "--rank", "3")
    assert ran.code == 0
    told, tensors = _header(here / "out.safetensors"), load_file(here / "out.safetensors")
    assert told["ss_sd_model_name"] == "new"
    assert "ss_new_sd_model_hash" not in told
    assert told["ss_seed"] == "42"
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("3", "1.5")
    raw = save(tensors, {key: value for key, value in told.items() if key.startswith("ss_")})
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert told["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert told["sshs_legacy_hash"] == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    assert told["modelspec.hash_sha256"] == f"0x{digest.hexdigest()}"


def test_what_is_private_stays_behind_when_told(here: Path, run: Run) -> None:
    ran = run(
        "port", "lora.safetensors", "--from", "old", "--to", "new", "-o", "out.safetensors", "--strip-private", "--json"
    )
    assert parse(PortReport, ran.out).removed == ["ss_output_name"]
    assert b"jane" not in (here / "out.safetensors").read_bytes()
