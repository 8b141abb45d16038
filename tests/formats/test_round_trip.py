"""What is read and written in one format comes back tensor for tensor, for files as the real tools write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from golden_files import build, golden
from safetensors import safe_open

from regraft import load_adapter
from regraft.formats._hashes import KEYS as HASHES

PEFT = [
    "qwen2.5-0.5b.peft-bias-all",
    "sd15-text-encoder.peft",
    "sd15-unet.peft",
    "sd15-unet.peft-dora",
    "tinyllama-1.1b.peft-lora-bias",
    "tinyllama-1.1b.peft-modules-to-save",
    "tinyllama-1.1b.peft-qv-rslora",
]
DIFFUSERS = [
    "flux1-dev.diffusers",
    "sd15.diffusers",
    "sd15.diffusers-all-layers",
    "sd15.diffusers-dora",
    "sd15.diffusers.transformers5",
    "sdxl.diffusers",
    "sdxl.diffusers.transformers5",
    "sdxl.onetrainer-diffusers",
    "sdxl.onetrainer-diffusers-dora",
    "ssd1b.diffusers",
]
KOHYA = [
    "sd15.kohya-c3lier",
    "sd15.kohya-from-diffusers",
    "sd15.kohya-lierla",
    "sd15.lycoris-dora",
    "sd15.lycoris-locon",
    "sdxl.kohya-from-diffusers",
    "sdxl.kohya-lierla",
    "sdxl.onetrainer-kohya",
    "sdxl.onetrainer-legacy",
    "sdxl.onetrainer-legacy-all-layers",
    "ssd1b.kohya-from-diffusers",
]
CASES = [(f, n) for f, names in (("peft", PEFT), ("diffusers", DIFFUSERS), ("kohya", KOHYA)) for n in names]


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    with safe_open(weights, framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds a golden list's file, once for all tests."""
    folder = tmp_path_factory.mktemp("golden")
    return cache(lambda name: build(name, folder))


@pytest.mark.parametrize(("format", "name"), CASES, ids=[name for _, name in CASES])
def test_reading_and_writing_gives_the_same_tensors_and_metadata_back(
    format: str, name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    source = made(name)
    adapter = load_adapter(source)
    target = tmp_path / ("again" if source.is_dir() else "again.safetensors")
    adapter.save(target)

    assert adapter.format == format
    assert adapter.unrecognised == ()
    (before, metadata), (after, metadata_after) = content(source), content(target)
    assert set(after) == set(before)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
    if "lora_adapter_metadata" in metadata:
        ours = json.loads(metadata_after.pop("lora_adapter_metadata"))
        assert ours == json.loads(metadata.pop("lora_adapter_metadata"))
    # The lists' hashes are placeholders, ours are those of the tensors (test_hashes.py).
    for key in HASHES:
        assert (key in metadata_after) == (key in metadata)
        metadata_after.pop(key, None)
        metadata.pop(key, None)
    assert metadata_after == metadata
    if source.is_dir():
        config = json.loads((source / "adapter_config.json").read_text())
        assert json.loads((target / "adapter_config.json").read_text()) == config


@pytest.mark.parametrize(("format", "name"), CASES, ids=[name for _, name in CASES])
def test_every_key_of_a_file_belongs_to_one_update(format: str, name: str, made: Callable[[str], Path]) -> None:
    adapter = load_adapter(made(name))
    parts = 0
    for update in adapter.updates.values():
        if update.kind == "full":
            parts += 1
        else:
            parts += 2 + sum(part is not None for part in (update.alpha, update.magnitude, update.bias))
    assert parts == golden(name)["n_tensors"]
