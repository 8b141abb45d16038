"""Embeddings that OneTrainer bundles into files of kohya's grammar and ComfyUI's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_files import golden
from safetensors.torch import load_file, save_file

from regraft import OutputError, load_adapter


def bundled(name: str, path: Path) -> Path:
    keys = [key for key in golden(name)["tensors"] if "_0_" in key or ".0." in key][:12]
    shapes = {key: golden(name)["tensors"][key]["shape"] for key in keys}
    tensors = {key: torch.ones([min(size, 8) for size in shape]) for key, shape in shapes.items()}
    embedding = {"bundle_emb.<v1.0>.clip_l": torch.rand(2, 768), "bundle_emb.<v1.0>.clip_g": torch.rand(2, 1280)}
    save_file(tensors | embedding, path)
    return path


@pytest.mark.parametrize("name", ["sdxl.onetrainer-legacy", "sdxl.onetrainer-kohya", "sdxl.onetrainer-comfy"])
def test_bundled_embeddings_are_read_and_come_back(name: str, tmp_path: Path) -> None:
    source = bundled(name, tmp_path / "source.safetensors")
    adapter = load_adapter(source)
    assert adapter.unrecognised == ()
    assert {(token.component, token.token) for token in adapter.tokens} == {
        ("text_encoder", "<v1.0>"),
        ("text_encoder_2", "<v1.0>"),
    }
    adapter.save(tmp_path / "again.safetensors")
    before, after = load_file(source), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_format_without_embeddings_refuses_them(tmp_path: Path) -> None:
    adapter = load_adapter(bundled("sdxl.onetrainer-legacy", tmp_path / "source.safetensors"))
    with pytest.raises(OutputError, match="embeddings of added tokens"):
        adapter.save(tmp_path / "musubi.safetensors", format="musubi")
    assert not (tmp_path / "musubi.safetensors").exists()
