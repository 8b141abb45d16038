"""Format, family and coverage of files at their real sizes, from headers alone."""

from __future__ import annotations

from collections import Counter
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


# Fused projections count once for each of their parts: 14 modules in a double block of Flux, 6 in a single one.
FLUX, FLUX_INPUTS = 19 * 14 + 38 * 6, 8
HUNYUAN = 20 * 12 + 40 * 5


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
        ("sdxl.onetrainer-kohya", "onetrainer", "sdxl", {"unet": 722, "text_encoder": 72, "text_encoder_2": 193}),
        (
            "sdxl.onetrainer-legacy-all-layers",
            "onetrainer",
            "sdxl",
            {"unet": 794, "text_encoder": 72, "text_encoder_2": 193},
        ),
        ("sdxl.onetrainer-comfy", "comfyui", "sdxl", {"unet": 722, "text_encoder": 72, "text_encoder_2": 193}),
        ("flux1-dev.kohya", "kohya", "flux", {"text_encoder": 72, "transformer": FLUX}),
        ("flux1-dev.kohya-all-layers", "kohya", "flux", {"text_encoder": 72, "transformer": FLUX + FLUX_INPUTS}),
        ("flux1-dev.kohya-split-qkv", "kohya", "flux", {"transformer": FLUX}),
        ("flux1-dev.onetrainer-legacy", "onetrainer", "flux", {"transformer": 419, "text_encoder": 72}),
        ("flux1-dev-control.bfl-control", "original", "flux-control", {"transformer": 504 + 152}),
        ("flux1-dev.xlabs", "xlabs", "flux", {"transformer": 19 * 8 + 38 * 4}),
        ("hunyuan-video.musubi", "musubi", "hunyuan-video", {"transformer": HUNYUAN}),
        ("hunyuan-video.comfyui-native", "comfyui", "hunyuan-video", {"transformer": HUNYUAN}),
        ("hunyuan-video.comfyui-native-from-musubi", "comfyui", "hunyuan-video", {"transformer": HUNYUAN}),
        ("hunyuan-video.onetrainer-legacy", "onetrainer", "hunyuan-video", {"transformer": 520}),
        ("wan21-t2v-14b.musubi", "musubi", "wan", {"transformer": 400}),
        ("wan21-t2v-1.3b.musubi", "musubi", "wan-1.3b", {"transformer": 300}),
        ("wan21-i2v-14b.musubi", "musubi", "wan-i2v", {"transformer": 480}),
        ("wan21-i2v-14b.comfyui-native-from-musubi", "comfyui", "wan-i2v", {"transformer": 480}),
        ("sd15.lycoris-loha", "lycoris", "sd15", {"text_encoder": 72, "unet": 282}),
        ("sd15.lycoris-diag-oft", "lycoris", "sd15", {"text_encoder": 72, "unet": 282}),
        ("sdxl.lycoris-lokr-dora-diffusers-unet", "lycoris", "sdxl", None),
    ],
)
def test_a_file_of_a_real_tool_is_recognised_whole(
    name: str, format: str, family: str, modules: dict[str, int] | None
) -> None:
    adapter = read(name)
    assert (adapter.format, adapter.family) == (format, family)
    counted = {component: len(paths) for component, paths in adapter.components().items()}
    assert modules is None or counted == modules
    assert adapter.unrecognised == ()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("sd15.lycoris-locon-tucker", {"lora": 302, "tucker": 52}),
        ("sd15.lycoris-loha", {"loha": 354}),
        ("sd15.lycoris-lokr", {"lokr": 354}),
        ("sd15.lycoris-diag-oft", {"oft": 354}),
        ("sd15.lycoris-glora", {"glora": 354}),
        ("sd15.lycoris-dora", {"dora": 354}),
        ("sd15.lycoris-full", {"diff": 828}),
        ("sd15.comfyui-native-extracted", {"lora": 282, "diff": 404}),
        ("flux1-dev-control.bfl-control", {"lora": 504, "full": 152}),
    ],
)
def test_every_kind_of_update_is_known(name: str, kinds: dict[str, int]) -> None:
    assert Counter(update.kind for update in read(name).updates.values()) == kinds
