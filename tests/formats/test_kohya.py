"""kohya files: names, alphas, magnitudes, and what other formats' adapters become."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_files import build, golden
from safetensors.torch import load_file, save_file

from regraft import Adapter, ModuleRef, OutputError, load_adapter
from regraft.adapter import TokenRef
from regraft.families import module_names
from regraft.tensor_files import read_safetensors
from regraft.tensors import InMemory
from regraft.updates import Full, LowRank

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = f"lora_unet_{PATH.replace('.', '_')}"
MODULE = ModuleRef("unet", PATH)


def low_rank(out: int = 320, into: int = 320, rank: int = 4, scale: float = 1.0) -> LowRank:
    torch.manual_seed(0)
    return LowRank(InMemory(torch.randn(out, rank)), InMemory(torch.randn(rank, into)), scale)


def one(tmp_path: Path, **more: torch.Tensor) -> Path:
    tensors = {f"{FLAT}.lora_up.weight": torch.ones(320, 4), f"{FLAT}.lora_down.weight": torch.ones(4, 320)}
    save_file(tensors | {f"{FLAT}.{name}": value for name, value in more.items()}, tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (None, 1.0),
        (torch.tensor(2.0), 0.5),
        (torch.tensor(2), 0.5),
        (torch.tensor(2.0, dtype=torch.float16), 0.5),
        (torch.tensor(1.0, dtype=torch.bfloat16), 0.25),
        (torch.tensor([8.0]), 2.0),
        (torch.tensor(0.0), 1.0),
    ],
    ids=["missing", "float32", "int64", "float16", "bfloat16", "one element", "zero"],
)
def test_alpha_of_any_kind_scales_and_comes_back_as_it_was(
    alpha: torch.Tensor | None, scale: float, tmp_path: Path
) -> None:
    source = one(tmp_path, **({} if alpha is None else {"alpha": alpha}))
    adapter = load_adapter(source)
    update = adapter.updates[MODULE]
    assert isinstance(update, LowRank)
    assert update.scale == scale

    adapter.save(tmp_path / "again.safetensors")
    again, before = load_file(tmp_path / "again.safetensors"), load_file(source)
    assert set(again) == set(before)
    assert all(torch.equal(again[key], before[key]) and again[key].dtype == before[key].dtype for key in before)


def test_a_changed_rank_keeps_the_scale_by_another_alpha(tmp_path: Path) -> None:
    adapter = load_adapter(one(tmp_path, alpha=torch.tensor(2.0, dtype=torch.float16)))
    update = adapter.updates[MODULE]
    assert isinstance(update, LowRank)
    up, down = update.factors()
    replace(adapter, updates={MODULE: update.with_factors(up[:, :3], down[:3])}).save(tmp_path / "cut.safetensors")
    again = load_adapter(tmp_path / "cut.safetensors").updates[MODULE]
    assert isinstance(again, LowRank)
    assert (again.rank, again.scale) == (3, 0.5)
    assert load_file(tmp_path / "cut.safetensors")[f"{FLAT}.alpha"].item() == 1.5


def test_a_magnitude_is_told_from_its_shape(tmp_path: Path) -> None:
    weight = torch.randn(1280, 320)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    stem = f"lora_unet_{path.replace('.', '_')}"
    for shape, dim in (((320, 1), 1), ((1, 1280), 0)):
        magnitude = torch.rand(shape) + 0.5
        up, down = torch.randn(320, 2), torch.randn(2, 1280)
        keys = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitude}
        file = tmp_path / f"dora{dim}.safetensors"
        save_file({f"{stem}.{key}": value for key, value in keys.items()}, file)
        update = load_adapter(file).updates[ModuleRef("unet", path)]
        changed = weight.T + up @ down
        expected = magnitude * changed / changed.norm(dim=dim, keepdim=True)
        assert torch.allclose(update.merged(weight.T), expected, atol=1e-4)


def test_sdxl_is_written_in_sgm_names_with_two_text_encoders(tmp_path: Path) -> None:
    updates = {}
    for component, last in (("unet", "attn2.to_k"), ("text_encoder", "q_proj"), ("text_encoder_2", "fc1")):
        for path, shape in module_names("sdxl", component).items():
            if path.endswith(last):
                updates[ModuleRef(component, path)] = low_rank(shape[0], shape[1])
    Adapter(updates, "regraft", family="sdxl").save(tmp_path / "xl.safetensors", format="kohya")
    keys = set(load_file(tmp_path / "xl.safetensors"))
    known = set(golden("sdxl.kohya-lierla")["tensors"])
    assert keys <= known
    assert len(keys) == 3 * len(updates)
    metadata = read_safetensors(tmp_path / "xl.safetensors").metadata
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert load_adapter(tmp_path / "xl.safetensors").family == "sdxl"


def test_sgm_names_lead_to_the_modules_that_diffusers_finds(tmp_path: Path) -> None:
    adapter = load_adapter(build("sdxl.kohya-lierla", tmp_path))
    theirs = {
        key.replace(".processor.", ".").replace("to_out_lora", "to_out.0_lora").split("_lora.")[0].split(".lora")[0]
        for key in golden("sdxl.to-diffusers.kohya-lierla")["tensors"]
        if key.startswith("unet.")
    }
    assert {str(module) for module in adapter.updates if module.component == "unet"} == theirs


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_the_level_text_model_is_put_in_for_kohya_alone(format: str, tmp_path: Path) -> None:
    new = ModuleRef("text_encoder", "encoder.layers.0.self_attn.q_proj")
    Adapter({new: low_rank(768, 768)}, "regraft").save(tmp_path / "te.safetensors", format=format)
    keys = list(load_file(tmp_path / "te.safetensors"))
    if format == "kohya":
        assert all(key.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj.") for key in keys)
    else:
        assert all(key.startswith("text_encoder.encoder.layers.0.self_attn.q_proj.") for key in keys)


def test_a_file_that_lacks_text_model_is_written_without_it(tmp_path: Path) -> None:
    stem = "lora_te_encoder_layers_0_mlp_fc1"
    tensors = {f"{stem}.lora_up.weight": torch.ones(3072, 2), f"{stem}.lora_down.weight": torch.ones(2, 768)}
    save_file(tensors, tmp_path / "te.safetensors")
    adapter = load_adapter(tmp_path / "te.safetensors")
    assert list(adapter.updates) == [ModuleRef("text_encoder", "encoder.layers.0.mlp.fc1")]
    adapter.save(tmp_path / "again.safetensors")
    assert set(load_file(tmp_path / "again.safetensors")) == set(tensors)


def test_the_names_of_a_base_unflatten_what_no_table_knows(tmp_path: Path) -> None:
    names = {"transformer": ("blocks.0.self_attn.q_k.weight", "blocks.0.self_attn.q_k.bias")}
    stem = "lora_unet_blocks_0_self_attn_q_k"
    tensors = {f"{stem}.lora_up.weight": torch.ones(8, 2), f"{stem}.lora_down.weight": torch.ones(2, 8)}
    save_file(tensors, tmp_path / "new.safetensors")
    assert dict(load_adapter(tmp_path / "new.safetensors").updates) == {}
    adapter = load_adapter(tmp_path / "new.safetensors", names=names)
    assert list(adapter.updates) == [ModuleRef("transformer", "blocks.0.self_attn.q_k")]
    adapter.save(tmp_path / "again.safetensors")
    assert set(load_file(tmp_path / "again.safetensors")) == set(tensors)


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.5])
def test_any_scale_becomes_an_alpha(scale: float, tmp_path: Path) -> None:
    Adapter({MODULE: low_rank(scale=scale)}, "regraft").save(tmp_path / "x.safetensors", format="kohya")
    again = load_adapter(tmp_path / "x.safetensors").updates[MODULE]
    assert isinstance(again, LowRank)
    assert math.isclose(again.scale, scale, rel_tol=1e-6)


LOSSES = [
    ("kohya", {ModuleRef("unet", "conv_in.weight"): Full(InMemory(torch.ones(2)), "k")}, "parameter stored whole"),
    ("diffusers", {ModuleRef("unet", "conv_in.weight"): Full(InMemory(torch.ones(2)), "k")}, "parameters stored whole"),
    ("kohya", {MODULE: replace(low_rank(), orientation="embedding")}, "embedding"),
    ("diffusers", {MODULE: replace(low_rank(), orientation="conv1d")}, "Conv1D"),
    ("kohya", {MODULE: replace(low_rank(), bias=InMemory(torch.ones(320)))}, "lora_bias"),
    ("kohya", {ModuleRef("controlnet", PATH): low_rank()}, "the component controlnet"),
    ("diffusers", {MODULE: replace(low_rank(), magnitude=InMemory(torch.ones(1, 320)))}, "per input column"),
    ("peft", {MODULE: replace(low_rank(), magnitude=InMemory(torch.ones(1, 320)))}, "per input column"),
    ("peft", {MODULE: low_rank(), ModuleRef("text_encoder", "q_proj"): low_rank()}, "hold one model"),
    (
        "peft",
        {MODULE: low_rank(), ModuleRef("unet", "conv"): replace(low_rank(), magnitude=InMemory(torch.ones(320)))},
        "modules with DoRA beside modules without",
    ),
    ("kohya", {ModuleRef("model", "some.layer"): low_rank()}, "don't tell"),
    ("diffusers", {ModuleRef("model", "some.layer"): low_rank()}, "don't tell"),
]


@pytest.mark.parametrize(("format", "updates", "says"), LOSSES, ids=[f"{f}: {s}" for f, _, s in LOSSES])
def test_what_a_format_can_not_hold_is_refused_and_nothing_is_written(
    format: str, updates: dict[ModuleRef, LowRank | Full], says: str, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=says) as error:
        Adapter(updates, "regraft").save(tmp_path / "out", format=format)
    assert error.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_tokens_are_refused_by_formats_without_a_place_for_them(tmp_path: Path) -> None:
    adapter = Adapter(
        {MODULE: low_rank()}, "regraft", tokens={TokenRef("text_encoder", "<s1>"): InMemory(torch.ones(768))}
    )
    for format in ("musubi", "xlabs", "peft"):
        with pytest.raises(OutputError, match="<s1>"):
            adapter.save(tmp_path / "out", format=format)
