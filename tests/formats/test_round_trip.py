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

# Every list of a real tool's keys.
CASES = {
    "peft": [
        "flux1-dev.peft",
        "qwen2.5-0.5b.peft",
        "qwen2.5-0.5b.peft-bias-all",
        "sd15-text-encoder.peft",
        "sd15-unet.peft",
        "sd15-unet.peft-dora",
        "sd15-unet.peft-loha",
        "sd15-unet.peft-lokr",
        "tinyllama-1.1b.peft",
        "tinyllama-1.1b.peft-lora-bias",
        "tinyllama-1.1b.peft-modules-to-save",
        "tinyllama-1.1b.peft-qv-rslora",
        "wan21-t2v-14b.peft",
    ],
    "diffusers": [
        "flux1-dev-control.diffusers-control",
        "flux1-dev-control.to-diffusers.bfl-control",
        "flux1-dev.diffusers",
        "flux1-dev.diffusers-all-layers",
        "flux1-dev.diffusers.transformers5",
        "flux1-dev.onetrainer-diffusers",
        "flux1-dev.to-diffusers.kohya",
        "hunyuan-video.diffusers",
        "hunyuan-video.onetrainer-diffusers",
        "hunyuan-video.to-diffusers.comfyui-native-from-musubi",
        "sd15.diffusers",
        "sd15.diffusers-all-layers",
        "sd15.diffusers-dora",
        "sd15.diffusers.transformers5",
        "sd15.to-diffusers.kohya-c3lier",
        "sdxl.diffusers",
        "sdxl.diffusers.transformers5",
        "sdxl.onetrainer-diffusers",
        "sdxl.onetrainer-diffusers-dora",
        "sdxl.to-diffusers.kohya-lierla",
        "ssd1b.diffusers",
        "wan21-i2v-14b.diffusers",
        "wan21-i2v-14b.to-diffusers.musubi",
        "wan21-t2v-14b.diffusers",
        "wan21-t2v-14b.to-diffusers.musubi",
    ],
    "kohya": [
        "flux1-dev.kohya",
        "flux1-dev.kohya-all-layers",
        "flux1-dev.kohya-split-qkv",
        "sd15.kohya-c3lier",
        "sd15.kohya-from-diffusers",
        "sd15.kohya-lierla",
        "sdxl.kohya-from-diffusers",
        "sdxl.kohya-lierla",
        "ssd1b.kohya-from-diffusers",
        "ssd1b.kohya-sgm",
    ],
    "lycoris": [
        "sd15.lycoris-diag-oft",
        "sd15.lycoris-dora",
        "sd15.lycoris-full",
        "sd15.lycoris-glora",
        "sd15.lycoris-locon",
        "sd15.lycoris-locon-tucker",
        "sd15.lycoris-loha",
        "sd15.lycoris-lokr",
        "sd15.lycoris-lokr-factor8-tucker",
        "sdxl.lycoris-lokr-dora-diffusers-unet",
    ],
    "musubi": [
        "hunyuan-video.musubi",
        "wan21-i2v-14b.musubi",
        "wan21-t2v-1.3b.musubi",
        "wan21-t2v-14b.musubi",
    ],
    "onetrainer": [
        "flux1-dev.onetrainer-kohya",
        "flux1-dev.onetrainer-legacy",
        "hunyuan-video.onetrainer-legacy",
        "sdxl.onetrainer-kohya",
        "sdxl.onetrainer-legacy",
        "sdxl.onetrainer-legacy-all-layers",
    ],
    "comfyui": [
        "flux1-dev.comfyui-native-extracted",
        "hunyuan-video.comfyui-native",
        "hunyuan-video.comfyui-native-from-musubi",
        "sd15.comfyui-native-extracted",
        "sdxl.onetrainer-comfy",
        "wan21-i2v-14b.comfyui-native-from-musubi",
        "wan21-t2v-14b.comfyui-native-from-musubi",
    ],
    "original": ["flux1-dev-control.bfl-control"],
    "xlabs": ["flux1-dev.xlabs"],
}
NAMED = [(format, name) for format, names in CASES.items() for name in names]


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    with safe_open(weights, framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds a golden list's file, once for all tests."""
    folder = tmp_path_factory.mktemp("golden")
    return cache(lambda name: build(name, folder))


@pytest.mark.parametrize(("format", "name"), NAMED, ids=[name for _, name in NAMED])
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


@pytest.mark.parametrize(("format", "name"), NAMED, ids=[name for _, name in NAMED])
def test_every_key_of_a_file_belongs_to_an_update(format: str, name: str, made: Callable[[str], Path]) -> None:
    adapter = load_adapter(made(name))
    keys = set()
    for update in adapter.updates.values():
        for ref in update.parts().values():
            while not hasattr(ref, "name"):
                # A view: of the rows of a fused weight, or of another shape.
                ref = ref.of
            keys.add(ref.name)
    assert keys == set(golden(name)["tensors"])
