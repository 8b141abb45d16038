"""The numbered modules of cloneofsimo/lora, on its own example file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft import InputError, ModuleRef, OutputError, load_adapter
from regraft.adapter import TokenRef
from regraft.families import module_names
from regraft.formats.cloneofsimo import module_order
from regraft.inspection import inspect_adapter
from regraft.ops.convert import convert_adapter
from regraft.tensor_files import read_safetensors
from regraft.tensors import InMemory

REAL = Path(__file__).parents[1] / "data" / "analog_svd_rank4.safetensors"
DOWN = [f"down_blocks.{stage}.attentions.{i}" for stage in range(3) for i in range(2)]
UP = [f"up_blocks.{stage}.attentions.{i}" for stage in range(1, 4) for i in range(3)]
MID = ["mid_block.attentions.0"]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ONE, TWO, FF = [f"attn1.{p}" for p in ATTENTION], [f"attn2.{p}" for p in ATTENTION], ["ff.net.0.proj"]


def order(blocks: Sequence[str], inside: Sequence[str]) -> list[str]:
    return [f"{block}.transformer_blocks.0.{part}" for block in blocks for part in inside]


def misfits(component: str, paths: Sequence[str]) -> int:
    """How many numbers of the real file have shapes that the module of that number can't have."""
    tensors, shapes = read_safetensors(REAL).tensors, module_names("sd15", component)
    found = 0
    for number, path in enumerate(paths):
        up, down = (tensors[f"{component}:{number}:{half}"].shape for half in ("up", "down"))
        found += (up[0], down[1]) != shapes[path][:2]
    return found


def test_all_144_numbers_of_the_unet_fit_down_then_up_then_middle() -> None:
    ours = order([*DOWN, *UP, *MID], [*ONE, *FF, *TWO])
    assert list(module_order("unet")) == ours
    assert len(ours) == 144
    assert misfits("unet", ours) == 0


@pytest.mark.parametrize(
    ("blocks", "inside"),
    [
        ([*DOWN, *MID, *UP], [*ONE, *FF, *TWO]),
        ([*DOWN, *UP, *MID], [*ONE, *TWO, *FF]),
        ([*DOWN, *MID, *UP], [*ONE, *TWO, *FF]),
        ([*DOWN, *UP, *MID], [*FF, *ONE, *TWO]),
        ([*DOWN, *UP, *MID], [*TWO, *FF, *ONE]),
    ],
    ids=["middle before up", "ff after attn2", "both", "ff first", "attn2 first"],
)
def test_no_other_order_fits(blocks: list[str], inside: list[str]) -> None:
    assert misfits("unet", order(blocks, inside)) > 0


def test_all_48_numbers_of_the_text_encoder_fit() -> None:
    ours = module_order("text_encoder")[:48]
    assert ours[:4] == tuple(f"text_model.encoder.layers.0.self_attn.{p}_proj" for p in ("k", "v", "q", "out"))
    assert misfits("text_encoder", ours) == 0


def test_the_real_file_is_a_stable_diffusion_lora_of_rank_4() -> None:
    report = inspect_adapter(REAL)
    assert (report.format, report.family) == ("cloneofsimo", "sd15")
    assert {name: c.modules for name, c in report.components.items()} == {"unet": 144, "text_encoder": 48}
    assert all(c.ranks == [4] and c.kinds == {"lora": c.modules} for c in report.components.values())
    assert report.unrecognised == []


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_the_real_file_keeps_every_delta_in_another_format_and_its_bytes_on_the_way_back(
    format: str, tmp_path: Path
) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    convert_adapter(REAL, there, format)
    original, converted = load_adapter(REAL), load_adapter(there)

    assert converted.family == "sd15"
    assert set(converted.updates) == set(original.updates)
    for module, update in original.updates.items():
        other = converted.updates[module]
        # Equal factors and scale, rather than equal products: 192 of these take seconds.
        assert other.scale == update.scale == 1.0
        assert torch.equal(other.up.load(), update.up.load()), module
        assert torch.equal(other.down.load(), update.down.load()), module

    convert_adapter(there, back, "cloneofsimo")
    before, after = load_file(REAL), load_file(back)
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)
    ours, theirs = read_safetensors(back).metadata, read_safetensors(REAL).metadata
    assert {key: ours[key] for key in theirs} == dict(theirs)


def test_embedded_tokens_come_back(tmp_path: Path) -> None:
    tensors = load_file(REAL) | {"<s1>": torch.ones(768, dtype=torch.float16)}
    metadata = dict(read_safetensors(REAL).metadata) | {"<s1>": "<embed>"}
    save_file(tensors, tmp_path / "with.safetensors", metadata=metadata)
    adapter = load_adapter(tmp_path / "with.safetensors")
    assert {token: ref.shape for token, ref in adapter.tokens.items()} == {TokenRef("text_encoder", "<s1>"): (768,)}
    assert inspect_adapter(tmp_path / "with.safetensors").tokens == {"<s1>": [768]}

    adapter.save(tmp_path / "again.safetensors")
    assert read_safetensors(tmp_path / "again.safetensors").metadata == metadata
    assert torch.equal(load_file(tmp_path / "again.safetensors")["<s1>"], tensors["<s1>"])
    with pytest.raises(OutputError, match=r"<s1>.*tokens"):
        adapter.save(tmp_path / "lost.safetensors", format="musubi")
    adapter.save(tmp_path / "bundled.safetensors", format="kohya")
    bundled = load_adapter(tmp_path / "bundled.safetensors").tokens[TokenRef("text_encoder", "<s1>")]
    assert torch.equal(bundled.load(), tensors["<s1>"])


def test_other_target_classes_are_not_taken_for_the_usual_ones(tmp_path: Path) -> None:
    metadata = dict(read_safetensors(REAL).metadata) | {"unet": json.dumps(["ResnetBlock2D", "CrossAttention"])}
    save_file(load_file(REAL), tmp_path / "extended.safetensors", metadata=metadata)
    adapter = load_adapter(tmp_path / "extended.safetensors")
    assert set(adapter.components()) == {"text_encoder"}
    assert len(adapter.unrecognised) == 288


def test_a_scale_is_folded_into_up(tmp_path: Path) -> None:
    adapter = load_adapter(REAL)
    module = ModuleRef("unet", module_order("unet")[0])
    update = adapter.updates[module].cast(torch.float32)
    scaled = replace(adapter, updates={module: replace(update, scale=0.5)})
    scaled.save(tmp_path / "half.safetensors")
    again = load_adapter(tmp_path / "half.safetensors").updates[module]
    assert again.scale == 1.0
    assert torch.allclose(again.delta(), update.delta() / 2)


@pytest.mark.parametrize(
    ("path", "changes", "says"),
    [
        ("conv_in", {}, "conv_in.*this module"),
        (module_order("unet")[0], {"magnitude": InMemory(torch.ones(320))}, "DoRA"),
        (module_order("unet")[0], {"bias": InMemory(torch.ones(320))}, "bias"),
    ],
)
def test_what_it_can_not_hold_is_refused(path: str, changes: dict[str, InMemory], says: str, tmp_path: Path) -> None:
    adapter = load_adapter(REAL)
    update = replace(next(u for m, u in adapter.updates.items() if m.component == "unet"), **changes)
    with pytest.raises(OutputError, match=says):
        replace(adapter, updates={ModuleRef("unet", path): update}).save(tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_metadata_that_is_no_list_is_named(tmp_path: Path) -> None:
    save_file(load_file(REAL), tmp_path / "bad.safetensors", metadata={"unet": "CrossAttention"})
    with pytest.raises(InputError, match=r"bad\.safetensors: metadata unet: is not a JSON list"):
        load_adapter(tmp_path / "bad.safetensors")
