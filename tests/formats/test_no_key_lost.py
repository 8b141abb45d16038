"""Every key of a file is a part of an update or of a token, or listed as not understood, or the file is refused."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from golden_files import build, golden
from safetensors.torch import load_file, save_file
from test_round_trip import CASES, content

from regraft import Adapter, InputError, ModuleRef, OutputError, load_adapter
from regraft.formats._suffixes import SUFFIXES, split_key
from regraft.tensors import InMemory, TensorRef
from regraft.updates import LowRank

# The config beside PEFT's files makes most changes an error: they get more rounds, on files of one kind each.
PEFT = {
    "qwen2.5-0.5b.peft-bias-all",
    "sd15-unet.peft-dora",
    "sd15-unet.peft-lokr",
    "tinyllama-1.1b.peft-modules-to-save",
}
NAMES = [name for format, names in CASES.items() for name in names if format != "peft" or name in PEFT]
ROUNDS = 6
KEPT = 60
#: What stands at the end of a key that no tool writes.
ODD = ("", ".weight", ".bias", ".lora_middle.weight", ".lora_down", ".alpha.weight", ".scale", ".on_output")


def refs_in(adapter: Adapter) -> Iterator[TensorRef]:
    for update in adapter.updates.values():
        yield from update.parts().values()
    yield from adapter.tokens.values()


def held(refs: Iterable[TensorRef]) -> set[str]:
    """The keys whose tensors the references read, through every view."""
    keys, open_ = set(), list(refs)
    while open_:
        ref = open_.pop()
        below = [getattr(ref, name) for name in ("of",) if hasattr(ref, name)]
        below += [*getattr(ref, "parts", ()), *getattr(ref, "refs", ())]
        open_ += below
        if not below and hasattr(ref, "name"):
            keys.add(ref.name)
    return keys


def changed(tensors: dict[str, torch.Tensor], chance: random.Random) -> dict[str, torch.Tensor]:
    """Some of the keys, with a few of them missing, renamed, or there again under a further suffix."""
    # Whole modules, so that most updates stay complete.
    stems = sorted({(split_key(key) or (key, ""))[0] for key in tensors})
    some = set(chance.sample(stems, min(len(stems), KEPT)))
    kept = {key: tensor for key, tensor in tensors.items() if (split_key(key) or (key, ""))[0] in some}
    endings = (*SUFFIXES, *ODD)
    for key in chance.sample(sorted(kept), min(len(kept), 4)):
        stem, suffix = split_key(key) or (key, "")
        act = chance.randrange(5)
        if act == 0:
            del kept[key]
        elif act == 1:
            kept[stem + chance.choice(endings)] = kept.pop(key)
        elif act == 2:
            kept[stem + chance.choice(endings)] = torch.ones(kept[key].shape, dtype=torch.float32)
        elif act == 3:
            kept[f"{stem}x{suffix}"] = kept[key].clone()
        else:
            kept[chance.choice(("", "x.", stem.split(".")[0])) + chance.choice(endings)] = torch.ones(())
    kept.pop("", None)
    return kept


def test_a_suffix_that_nobody_knows_leaves_the_other_keys_understood(tmp_path: Path) -> None:
    data = golden("sdxl.kohya-lierla")
    tensors = {key: torch.ones(about["shape"]) for key, about in list(data["tensors"].items())[-90:]}
    strange = f"{next(iter(tensors)).split('.')[0]}.on_output"
    save_file({**tensors, strange: torch.ones(1)}, tmp_path / "in.safetensors")
    adapter = load_adapter(tmp_path / "in.safetensors")
    assert (adapter.family, adapter.unrecognised, len(adapter.updates)) == ("sdxl", (strange,), 30)


def test_a_bias_of_b_keeps_the_spelling_of_its_pair(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{}"
    tensors = {}
    for name in ("q", "k", "v", "out_0"):
        tensors[f"{stem.format(name)}.lora_down.weight"] = torch.ones(2, 320)
        tensors[f"{stem.format(name)}.lora_up.weight"] = torch.ones(320, 2)
        tensors[f"{stem.format(name)}.lora_up.bias"] = torch.ones(320)
    save_file(tensors, tmp_path / "in.safetensors")
    adapter = load_adapter(tmp_path / "in.safetensors")
    adapter.save(tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("format", ["musubi", "xlabs", "original"])
def test_a_text_encoder_is_refused_by_formats_of_one_model(format: str, tmp_path: Path) -> None:
    t5 = ModuleRef("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q")
    pair = LowRank(InMemory(torch.ones(4096, 2)), InMemory(torch.ones(2, 4096)), 1.0)
    with pytest.raises(OutputError, match="component text_encoder_2"):
        Adapter({t5: pair}, "none", family="flux").save(tmp_path / "out.safetensors", format=format)


def test_two_modules_of_one_underscored_name_are_refused(tmp_path: Path) -> None:
    pair = LowRank(InMemory(torch.ones(8, 2)), InMemory(torch.ones(2, 8)), 1.0)
    twins = {ModuleRef("unet", path): pair for path in ("block.to_q", "block_to.q")}
    with pytest.raises(OutputError, match="second module that is written as lora_unet_block_to_q"):
        Adapter(twins, "none").save(tmp_path / "out.safetensors", format="kohya")


def test_values_of_a_fused_weight_and_its_bias_keep_their_own_keys(tmp_path: Path) -> None:
    stem = "diffusion_model.double_blocks.{}.img_attn"
    tensors = {}
    for block in range(19):
        tensors[f"{stem.format(block)}.qkv.weight"] = torch.full((72, 24), 2.0 + block)
        tensors[f"{stem.format(block)}.qkv.bias"] = torch.full((72,), 3.0 + block)
        tensors[f"{stem.format(block)}.norm.query_norm.scale"] = torch.full((8,), 4.0 + block)
        tensors[f"{stem.format(block)}.proj.lora_A.weight"] = torch.ones(2, 24)
        tensors[f"{stem.format(block)}.proj.lora_B.weight"] = torch.ones(24, 2)
    save_file(tensors, tmp_path / "in.safetensors")
    adapter = load_adapter(tmp_path / "in.safetensors")
    assert adapter.unrecognised == ()
    adapter.save(tmp_path / "out.safetensors")
    again = load_file(tmp_path / "out.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", NAMES)
def test_no_key_is_lost_without_a_word(name: str, tmp_path: Path) -> None:
    source = build(name, tmp_path)
    file = source / "adapter_model.safetensors" if source.is_dir() else source
    tensors, metadata = content(source)
    for round_ in range(4 * ROUNDS if name in PEFT else ROUNDS):
        wrong = changed(tensors, random.Random(f"{name} {round_}"))
        save_file(wrong, file, metadata=metadata)
        try:
            adapter = load_adapter(source)
        except InputError:
            continue
        known = held(refs_in(adapter))
        assert known | set(adapter.unrecognised) == set(wrong), round_
        assert not known & set(adapter.unrecognised), round_
        try:
            files = adapter.save(tmp_path / ("out" if source.is_dir() else "out.safetensors"), overwrite=True)
        except OutputError:
            continue
        # A pair in two spellings gets one of them, so that keys are counted.
        assert len(load_file(files[0])) >= len(known), round_
