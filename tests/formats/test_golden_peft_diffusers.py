"""PEFT's and diffusers' files as the real tools write them, family by family: every tensor belongs to one update.

That they come back with the same bytes is tested with all other formats' in `test_round_trip.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_files import build, golden

from regraft import load_adapter

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


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_a_real_tools_file_is_a_part_of_one_update(name: str, tmp_path: Path) -> None:
    source = build(name, tmp_path)
    adapter = load_adapter(source)
    assert adapter.format == ("peft" if ".peft" in name else "diffusers")
    assert adapter.unrecognised == ()
    modules = {component: len(updates) for component, updates in adapter.components().items()}
    assert modules == (CASES[name] or modules)
    assert sum(len(update.parts()) for update in adapter.updates.values()) == golden(name)["n_tensors"]
