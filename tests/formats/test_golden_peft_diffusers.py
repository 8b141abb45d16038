"""PEFT's and diffusers' files as the real tools write them, family by family: nothing is lost on the way through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_files import build, golden
from safetensors import safe_open

from regraft import load_adapter
from regraft.formats._hashes import KEYS as HASHES

# Name of the list → modules by component.
CASES: dict[str, dict[str, int]] = {
    "qwen2.5-0.5b.peft": {"model": 168},
    "tinyllama-1.1b.peft": {"model": 154},
    "flux1-dev.peft": {"model": 190},
    "wan21-t2v-14b.peft": {"model": 400},
    "sd15-unet.peft-loha": {"model": 150},
    "sd15-unet.peft-lokr": {"model": 150},
    "flux1-dev.diffusers-all-layers": {"transformer": 504},
    "flux1-dev.diffusers.transformers5": {"transformer": 342, "text_encoder": 48},
    "flux1-dev.onetrainer-diffusers": {},
    "flux1-dev-control.diffusers-control": {"transformer": 191},
    "hunyuan-video.diffusers": {"transformer": 369},
    "hunyuan-video.onetrainer-diffusers": {"transformer": 520},
    "wan21-i2v-14b.diffusers": {"transformer": 480},
    "wan21-t2v-14b.diffusers": {"transformer": 400},
    # What diffusers' own converters hand to its loader: files of this form are about.
    "flux1-dev-control.to-diffusers.bfl-control": {"transformer": 504 + 152},
    "flux1-dev.to-diffusers.kohya": {},
    "hunyuan-video.to-diffusers.comfyui-native-from-musubi": {"transformer": 440},
    "wan21-i2v-14b.to-diffusers.musubi": {"transformer": 480},
    "wan21-t2v-14b.to-diffusers.musubi": {"transformer": 400},
}


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    with safe_open(weights, framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_a_real_tool_comes_back_key_for_key(name: str, tmp_path: Path) -> None:
    source = build(name, tmp_path)
    adapter = load_adapter(source)
    assert adapter.format == ("peft" if ".peft" in name else "diffusers")
    assert adapter.unrecognised == ()
    modules = {component: len(updates) for component, updates in adapter.components().items()}
    assert modules == (CASES[name] or modules)
    assert sum(len(update.parts()) for update in adapter.updates.values()) == golden(name)["n_tensors"]

    target = tmp_path / ("again" if source.is_dir() else "again.safetensors")
    adapter.save(target)
    (before, metadata), (after, metadata_after) = content(source), content(target)
    assert set(after) == set(before)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
    if "lora_adapter_metadata" in metadata:
        ours = json.loads(metadata_after.pop("lora_adapter_metadata"))
        assert ours == json.loads(metadata.pop("lora_adapter_metadata"))
    # The lists' hashes are placeholders.
    plain = [{key: value for key, value in each.items() if key not in HASHES} for each in (metadata, metadata_after)]
    assert plain[0] == plain[1]
    if source.is_dir():
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (source, target)]
        assert configs[0] == configs[1]
