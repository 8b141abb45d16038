"""SVDiff: files come back key for key, and the weights change as svdiff-pytorch's layers compute them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regraft import InputError, ModuleRef, OutputError, load_adapter
from regraft.inspection import inspect_adapter
from regraft.tensors import InMemory
from regraft.updates import LowRank

UNET = {
    "conv_in.delta": torch.randn(36),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.delta": torch.randn(320),
    "down_blocks.0.attentions.0.transformer_blocks.0.norm1.delta": torch.randn(1),
}
TEXT = {
    "text_model.embeddings.token_embedding.delta": torch.randn(768),
    "text_model.encoder.layers.0.self_attn.q_proj.delta": torch.randn(768),
}


def written(folder: Path, *, text: bool = True) -> Path:
    folder.mkdir()
    save_file(UNET, folder / "spectral_shifts.safetensors")
    if text:
        save_file(TEXT, folder / "spectral_shifts_te.safetensors")
    return folder


@pytest.mark.parametrize("text", [True, False], ids=["with text encoder", "U-Net alone"])
def test_a_folder_comes_back_file_for_file(text: bool, tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path / "theirs", text=text))
    assert (adapter.format, adapter.unrecognised) == ("svdiff", ())
    assert {c: len(updates) for c, updates in adapter.components().items()} == (
        {"unet": 3, "text_encoder": 2} if text else {"unet": 3}
    )
    adapter.save(tmp_path / "ours")
    assert sorted(f.name for f in (tmp_path / "ours").iterdir()) == sorted(
        f.name for f in (tmp_path / "theirs").iterdir()
    )
    for file in (tmp_path / "theirs").iterdir():
        before, after = load_file(file), load_file(tmp_path / "ours" / file.name)
        assert set(before) == set(after)
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_one_file_stays_one_file(tmp_path: Path) -> None:
    for name, tensors in (("unet", UNET), ("text", TEXT)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        load_adapter(tmp_path / f"{name}.safetensors").save(tmp_path / f"{name}-again.safetensors")
        assert set(load_file(tmp_path / f"{name}-again.safetensors")) == set(tensors)
    assert inspect_adapter(tmp_path / "unet.safetensors").components["unet"].kinds == {"svdiff": 3}


@pytest.mark.parametrize(("family", "number"), [("sd15", 320), ("sdxl", 640)])
def test_the_family_is_told_by_the_number_of_singular_values(family: str, number: int, tmp_path: Path) -> None:
    stage, block = (0, 0) if family == "sd15" else (1, 1)
    attention = f"down_blocks.{stage}.attentions.0.transformer_blocks.{block}"
    names = {f"{attention}.attn1.to_q.delta": number, f"{attention}.norm1.delta": 1, "conv_in.delta": 36}
    save_file({name: torch.ones(size) for name, size in names.items()}, tmp_path / "x.safetensors")
    assert load_adapter(tmp_path / "x.safetensors").family == family
    names["conv_in.delta"] = 35
    save_file({name: torch.ones(size) for name, size in names.items()}, tmp_path / "y.safetensors")
    assert load_adapter(tmp_path / "y.safetensors").family is None


def layers(weight: Tensor, delta: Tensor) -> Tensor:
    """SVDLinear, SVDConv2d and SVDLayerNorm of svdiff-pytorch (a78f69e): the weight as rows, or as one row."""
    rows = weight.unsqueeze(0) if weight.dim() == 1 else weight.flatten(1)
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    return (u @ torch.diag(torch.relu(s + delta)) @ v).reshape(weight.shape)


@pytest.mark.parametrize(
    "module",
    [nn.Linear(12, 8), nn.Conv2d(4, 8, 3), nn.LayerNorm(8), nn.Embedding(20, 6)],
    ids=lambda m: type(m).__name__,
)
def test_weights_change_as_svdiff_pytorch_s_layers_compute(module: nn.Module, tmp_path: Path) -> None:
    weight = torch.randn_like(module.weight)
    rows = weight.unsqueeze(0) if weight.dim() == 1 else weight.flatten(1)
    delta = torch.randn(min(rows.shape))
    save_file({"mid_block.x.delta": delta}, tmp_path / "spectral_shifts.safetensors")
    (update,) = load_adapter(tmp_path / "spectral_shifts.safetensors").updates.values()
    assert torch.allclose(update.merged(weight), layers(weight, delta), atol=1e-5)


def test_a_strength_is_written_into_the_shifts(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path / "theirs", text=False))
    halved = {module: update.scaled(0.5) for module, update in adapter.updates.items()}
    replace(adapter, updates=halved).save(tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "spectral_shifts.safetensors")
    assert all(torch.allclose(after[key], value / 2) for key, value in UNET.items())


def test_what_it_can_not_hold_is_refused(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path / "theirs"))
    lora = LowRank(InMemory(torch.ones(4, 2)), InMemory(torch.ones(2, 4)), 1.0)
    for updates, says in (
        ({ModuleRef("unet", "conv_in"): lora}, "lora updates"),
        ({ModuleRef("transformer", "x"): next(iter(adapter.updates.values()))}, "component transformer"),
    ):
        with pytest.raises(OutputError, match=says):
            replace(adapter, updates=updates).save(tmp_path / "out")
    with pytest.raises(OutputError, match="folder"):
        adapter.save(tmp_path / "both.safetensors")
    for format in ("kohya", "diffusers", "peft"):
        with pytest.raises(OutputError):
            adapter.save(tmp_path / "out", format=format)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [(torch.ones(4, 4), "must be a vector"), (torch.ones(0), "must be a vector"), (torch.ones(4).int(), "int32")],
)
def test_a_broken_shift_is_named(tensor: Tensor, says: str, tmp_path: Path) -> None:
    save_file({**UNET, "bad.delta": tensor}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=rf"bad\.delta: .*{says}"):
        load_adapter(tmp_path / "bad.safetensors")


def test_other_keys_are_listed(tmp_path: Path) -> None:
    other = "conv_in.parametrizations.weight.0.eigenvalues_delta"
    save_file({**UNET, other: torch.ones(4)}, tmp_path / "x.safetensors")
    assert load_adapter(tmp_path / "x.safetensors").unrecognised == (other,)
