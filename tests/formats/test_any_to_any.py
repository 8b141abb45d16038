"""Read → any other format → back loses nothing, or is refused before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from golden_files import build

from regraft import Adapter, ModuleRef, OutputError, load_adapter
from regraft.families import without_text_model
from regraft.formats import formats, save_adapter
from regraft.updates import Update

SOURCES = (
    "flux1-dev.comfyui-native-extracted",
    "flux1-dev.diffusers",
    "flux1-dev.kohya",
    "flux1-dev.onetrainer-legacy",
    "flux1-dev.peft",
    "flux1-dev.xlabs",
    "flux1-dev-control.bfl-control",
    "hunyuan-video.comfyui-native",
    "hunyuan-video.musubi",
    "sd15.diffusers-dora",
    "sd15.kohya-c3lier",
    "sd15.lycoris-full",
    "sd15.lycoris-loha",
    "sd15.lycoris-locon-tucker",
    "sd15.lycoris-lokr",
    "sd15.comfyui-native-extracted",
    "sdxl.kohya-lierla",
    "sdxl.onetrainer-comfy",
    "wan21-i2v-14b.diffusers",
    "wan21-t2v-14b.musubi",
)
TARGETS = sorted(name for name, format in formats().items() if format.write is not None)
# One block of each sort stands for all of them.
BLOCK = re.compile(r"\b(transformer_blocks|single_transformer_blocks|blocks|down_blocks|layers)\.0\.")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapter]:
    """A golden list's first blocks as an adapter, once for all tests."""
    folder = tmp_path_factory.mktemp("golden")

    @cache
    def make(name: str) -> Adapter:
        adapter = load_adapter(build(name, folder))
        kept = {ref: update for ref, update in adapter.updates.items() if BLOCK.search(ref.path)}
        assert kept
        return replace(adapter, updates=kept)

    return make


def changes(adapter: Adapter) -> dict[ModuleRef, Update]:
    main = next((component for component in adapter.components() if not component.startswith("text")), "model")
    return {
        ModuleRef("main" if ref.component in (main, "model") else ref.component, without_text_model(ref.path)): update
        for ref, update in adapter.updates.items()
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SOURCES)
def test_another_format_holds_the_same_or_refuses(
    name: str, target: str, made: Callable[[str], Adapter], tmp_path: Path
) -> None:
    adapter = made(name)
    path = tmp_path / ("written" if target == "peft" else "written.safetensors")
    try:
        save_adapter(adapter, path, format=target)
    except OutputError:
        if target == adapter.format:
            raise
        assert not path.exists()
        return
    again = load_adapter(path)
    assert again.unrecognised == ()
    before, after = changes(adapter), changes(again)
    assert set(after) >= set(before)
    for ref, update in after.items():
        if ref not in before:
            # The part of a fused weight that the adapter leaves alone.
            assert not update.delta().any(), ref
            continue
        if not update.additive and update.magnitude is None:
            assert update.parts().keys() == before[ref].parts().keys()
            continue
        assert torch.allclose(update.delta(), before[ref].delta().reshape(update.shape), atol=1e-4, rtol=1e-4), ref
        if before[ref].magnitude is not None:
            assert update.magnitude is not None, ref
            assert torch.equal(update.magnitude.load().flatten(), before[ref].magnitude.load().flatten()), ref
