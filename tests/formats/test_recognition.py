"""Format, family and coverage of files at their real sizes, from headers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_files import DTYPES, golden

from regraft import Adapter
from regraft.formats import AdapterFile, formats
from regraft.tensors import InMemory


def read(name: str) -> Adapter:
    """The golden list with tensors that have shapes but no values, scalars aside."""
    data = golden(name)
    tensors = {}
    for key, about in data["tensors"].items():
        device = "meta" if len(about["shape"]) > 1 else "cpu"
        tensors[key] = InMemory(torch.ones(about["shape"], dtype=DTYPES[about["dtype"]], device=device))
    file = AdapterFile(Path(name), tensors, data["metadata"], data.get("adapter_config"))
    format = next(format for format in formats().values() if format.detect(file))
    return format.read(file, None)


@pytest.mark.parametrize(
    ("name", "format", "family", "modules"),
    [
        ("sd15-unet.peft", "peft", "sd15", {"model": 250}),
        ("sd15-text-encoder.peft", "peft", "clip-l", {"model": 48}),
        ("tinyllama-1.1b.peft-qv-rslora", "peft", "llama", {"model": 44}),
        ("sd15.diffusers", "diffusers", "sd15", {"unet": 128, "text_encoder": 48}),
        ("sd15.diffusers.transformers5", "diffusers", "sd15", {"unet": 128, "text_encoder": 48}),
        ("sd15.diffusers-all-layers", "diffusers", "sd15", {"unet": 282}),
        ("sdxl.diffusers", "diffusers", "sdxl", {"unet": 560, "text_encoder": 48, "text_encoder_2": 128}),
        ("sdxl.onetrainer-diffusers", "diffusers", "sdxl", {"unet": 722, "text_encoder": 72, "text_encoder_2": 193}),
        ("flux1-dev.diffusers", "diffusers", "flux", {"transformer": 342, "text_encoder": 48}),
        ("sd15.kohya-lierla", "kohya", "sd15", {"unet": 192, "text_encoder": 72}),
        ("sd15.kohya-c3lier", "kohya", "sd15", {"unet": 278, "text_encoder": 72}),
        ("sdxl.kohya-lierla", "kohya", "sdxl", {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}),
        ("sdxl.kohya-from-diffusers", "kohya", "sdxl", {"unet": 560, "text_encoder": 48, "text_encoder_2": 128}),
        (
            "sdxl.onetrainer-legacy-all-layers",
            "kohya",
            "sdxl",
            {"unet": 794, "text_encoder": 72, "text_encoder_2": 193},
        ),
    ],
)
def test_a_file_of_a_real_tool_is_recognised_whole(
    name: str, format: str, family: str, modules: dict[str, int]
) -> None:
    adapter = read(name)
    assert (adapter.format, adapter.family) == (format, family)
    assert {component: len(paths) for component, paths in adapter.components().items()} == modules
    assert adapter.unrecognised == ()


@pytest.mark.parametrize("name", ["sd15-unet.peft-lokr", "sd15.lycoris-loha"])
def test_of_another_algorithm_every_key_is_listed(name: str) -> None:
    adapter = read(name)
    assert dict(adapter.updates) == {}
    assert len(adapter.unrecognised) == golden(name)["n_tensors"]


def test_tucker_modules_are_listed_and_the_plain_ones_beside_them_read() -> None:
    adapter = read("sd15.lycoris-locon-tucker")
    assert len(adapter.updates) == 354 - 52
    assert len(adapter.unrecognised) == 52 * 4
