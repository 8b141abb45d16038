"""What we read from other tools' files is what diffusers' own converters make of them, module for module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as convert
from golden_files import golden
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft import Adapter, load_adapter


def make(name: str, folder: Path) -> Path:
    """The golden list with random values: its rows are the real ones, which some converters take for granted."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, about in golden(name)["tensors"].items():
        shape = about["shape"]
        if key.endswith(".alpha"):
            tensors[key] = torch.tensor(1.0)
            continue
        up = "lora_B" in key or ".up." in key or "lora_up" in key
        size = tuple(shape) if len(shape) == 1 else (shape[0], 2) if up else (2, min(shape[1], 4))
        tensors[key] = torch.randn(size, generator=generator)
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    return path


def theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Module of the transformer → ΔW of a converted state dict, whose scale is 1."""
    return {
        key.removesuffix(".lora_A.weight").removeprefix("transformer."): state[key.replace("lora_A", "lora_B")] @ down
        for key, down in state.items()
        if key.endswith(".lora_A.weight")
    }


def ours(adapter: Adapter) -> dict[str, Tensor]:
    return {path: update.delta() for path, update in adapter.components()["transformer"].items()}


Converter = Callable[[dict[str, Tensor]], Any]
CASES: dict[str, Converter] = {
    "flux1-dev.kohya": convert._convert_kohya_flux_lora_to_diffusers,
    "flux1-dev.kohya-all-layers": convert._convert_kohya_flux_lora_to_diffusers,
    "flux1-dev.xlabs": convert._convert_xlabs_flux_lora_to_diffusers,
    "hunyuan-video.comfyui-native-from-musubi": convert._convert_hunyuan_video_lora_to_diffusers,
    "wan21-t2v-14b.musubi": convert._convert_musubi_wan_lora_to_diffusers,
    "wan21-i2v-14b.musubi": convert._convert_musubi_wan_lora_to_diffusers,
    "wan21-t2v-14b.comfyui-native-from-musubi": convert._convert_non_diffusers_wan_lora_to_diffusers,
    "wan21-i2v-14b.comfyui-native-from-musubi": convert._convert_non_diffusers_wan_lora_to_diffusers,
}


@pytest.mark.parametrize("name", CASES)
def test_we_read_what_the_converter_reads(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path)
    expected = theirs(CASES[name](load_file(source)))
    found = ours(load_adapter(source))
    # This converter has no place for the guidance embedder, and loses it.
    lost = {module for module in found if "guidance_embedder" in module} if "all-layers" in name else set()
    assert set(found) == set(expected) | lost
    for module, delta in expected.items():
        assert torch.allclose(found[module], delta, atol=1e-5), module


@pytest.mark.parametrize(
    ("name", "format", "converter"),
    [
        ("flux1-dev.diffusers", "kohya", convert._convert_kohya_flux_lora_to_diffusers),
        ("flux1-dev.diffusers", "xlabs", convert._convert_xlabs_flux_lora_to_diffusers),
        ("wan21-i2v-14b.diffusers", "musubi", convert._convert_musubi_wan_lora_to_diffusers),
        ("wan21-t2v-14b.diffusers", "comfyui", convert._convert_non_diffusers_wan_lora_to_diffusers),
    ],
)
def test_the_converter_reads_what_we_write(name: str, format: str, converter: Converter, tmp_path: Path) -> None:
    adapter = load_adapter(make(name, tmp_path))
    kept = {
        ref: update
        for ref, update in adapter.updates.items()
        if ref.component == "transformer" and (format != "xlabs" or ".attn.to_" in ref.path or ".add_" in ref.path)
    }
    target = tmp_path / "written.safetensors"
    part = Adapter(kept, adapter.format, adapter.layout, {}, family=adapter.family)
    part.save(target, format=format)
    found = theirs(converter(load_file(target)))
    expected = ours(part)
    # A fused weight of which only some parts are trained has the others as zeros.
    assert set(found) >= set(expected)
    for module, delta in found.items():
        wanted = expected.get(module, torch.zeros(()))
        assert torch.allclose(delta, wanted, atol=1e-5), module


def test_control_loras_are_read_as_the_converter_reads_them(tmp_path: Path) -> None:
    source = make("flux1-dev-control.bfl-control", tmp_path)
    converted = convert._convert_bfl_flux_control_lora_to_diffusers(load_file(source))
    found = load_adapter(source).components()["transformer"]
    kinds = {"lora": theirs(converted), "full": {}}
    for key, value in converted.items():
        if ".norm" in key and ".lora_" not in key:
            kinds["full"][key.removeprefix("transformer.")] = value
    assert {kind: {path for path, update in found.items() if update.kind == kind} for kind in kinds} == {
        kind: set(paths) for kind, paths in kinds.items()
    }
    # diffusers 0.42.1 lets the halves of adaLN's A change places with those of B, which makes another product of them:
    # only the rows of B are rows of the weight.
    state = load_file(source)
    shift, scale = state["final_layer.adaLN_modulation.1.lora_B.weight"].chunk(2)
    kinds["lora"]["norm_out.linear"] = torch.cat([scale, shift]) @ state["final_layer.adaLN_modulation.1.lora_A.weight"]
    for path, delta in kinds["lora"].items():
        assert torch.allclose(found[path].delta(), delta, atol=1e-5), path
        bias = found[path].parts()["bias"].load()
        assert torch.allclose(bias, converted[f"transformer.{path}.lora_B.bias"]), path
    for path, value in kinds["full"].items():
        assert torch.equal(found[path].parts()["value"].load(), value), path
