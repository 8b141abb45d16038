"""A base's fingerprint, and tensors read at their place in the file."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from regraft import Adapter, InputError, ModuleRef, open_base
from regraft.adapter import MODEL
from regraft.base import Base
from regraft.checkpoints.single_file import split_components
from regraft.families import family_of_base, module_names
from regraft.plan import check_families, locate
from regraft.tensor_files import read_safetensors
from regraft.tensors import InMemory, TensorRef, read_rows
from regraft.updates import LowRank
from toys import StateDict, drifted, llama, save_base

BIG = {"big.weight": torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), "small.bias": torch.ones(3)}


def fingerprint(state: StateDict, path: Path) -> str:
    return open_base(save_base(state, path)).fingerprint


def test_the_fingerprint_is_of_the_contents_and_not_of_the_layout(tmp_path: Path) -> None:
    state = llama()
    (tmp_path / "shards").mkdir()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, tmp_path / "shards" / file)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in parts.items() for name in held}}))
    torch.save(state, tmp_path / "one.pt")
    one = fingerprint(state, tmp_path / "one.safetensors")
    assert one == fingerprint(dict(reversed(state.items())), tmp_path / "other.safetensors")
    assert one == open_base(index).fingerprint == open_base(tmp_path / "one.pt").fingerprint


@pytest.mark.parametrize("change", ["values", "name", "shape", "small"])
def test_the_fingerprint_differs_for_another_version(tmp_path: Path, change: str) -> None:
    changed = {
        "values": {**drifted(BIG, 1e-3)},
        "name": {"other.weight": BIG["big.weight"], "small.bias": BIG["small.bias"]},
        "shape": {**BIG, "big.weight": BIG["big.weight"].reshape(32, 1024)},
        "small": {**BIG, "small.bias": torch.tensor([1.0, 1.0, 2.0])},
    }[change]
    assert fingerprint(BIG, tmp_path / "a.safetensors") != fingerprint(changed, tmp_path / "b.safetensors")


def test_a_fingerprint_of_many_tensors_does_not_read_the_header_for_each(tmp_path: Path) -> None:
    # With a header parse per tensor this takes more than ten seconds.
    base = open_base(
        save_base({f"layers.{i}.weight": torch.ones(9, 2048) for i in range(700)}, tmp_path / "m.safetensors")
    )
    started = time.process_time()
    assert base.fingerprint
    assert time.process_time() - started < 4


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2, 2), (6,), (), (0, 3), (3, 0)], ids=str)
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    wanted = torch.randint(0, 2, shape).to(dtype)
    save_file({"odd": torch.ones(3, dtype=torch.uint8), "x": wanted}, tmp_path / "x.safetensors", {"note": "é"})
    ref = read_safetensors(tmp_path / "x.safetensors").tensors["x"]
    loaded = ref.load()
    assert loaded.dtype == dtype
    assert torch.equal(loaded.float(), wanted.float())
    if shape:
        rows = read_rows(ref, [range(0, 2), range(3, 99)])
        assert torch.equal(rows.float(), torch.cat([wanted[0:2].float(), wanted[3:].float()]))


def test_a_file_that_was_replaced_meanwhile_is_not_read_at_the_old_places(tmp_path: Path) -> None:
    base = open_base(save_base(BIG, tmp_path / "m.safetensors"))
    save_base({"extra": torch.ones(5), **BIG}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="has changed"):
        base.weight(ModuleRef(MODEL, "big"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_an_8_bit_base_is_read_and_its_nan_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"a.weight": torch.ones(4, 4).to(dtype), "b.weight": torch.full((4, 4), float("nan")).to(dtype)}
    base = open_base(save_base(state, tmp_path / "m.safetensors"))
    assert base.weight(ModuleRef(MODEL, "a")).dtype == dtype
    with pytest.raises(InputError, match="NaN"):
        base.weight(ModuleRef(MODEL, "b"))


GOLDEN = Path(__file__).parent / "golden" / "bases"


def listed(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


def original(family: str, text: str) -> dict[str, TensorRef]:
    """Names and shapes of a whole single-file checkpoint, no bytes."""
    names = {
        f"model.diffusion_model.{name}": shape for name, shape in listed(f"{family}-unet.original")["params"].items()
    }
    names |= {f"{text}{path}.weight": shape for path, shape in module_names("sd15", "text_encoder").items()}
    names |= {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3), "cond_stage_model.logit_scale": ()}
    return {name: InMemory(torch.empty(tuple(shape), device="meta")) for name, shape in names.items()}


@pytest.mark.parametrize(
    ("family", "text"),
    [("sd15", "cond_stage_model.transformer."), ("sdxl", "conditioner.embedders.0.transformer.")],
)
def test_a_checkpoint_in_the_original_names_is_presented_as_diffusers_components(family: str, text: str) -> None:
    tensors = original(family, text)
    components, left_out = split_components(tensors)
    assert set(components) == {"unet", "text_encoder"}
    assert set(left_out) == {"first_stage_model.encoder.conv_in.weight", "cond_stage_model.logit_scale"}
    pairs = listed(f"{family}-unet.original")["map"]
    assert {name: f"model.diffusion_model.{old}" for old, name in pairs.items()} == {
        name: next(old for old, held in tensors.items() if held is ref) for name, ref in components["unet"].items()
    }
    base = Base(Path("sd.safetensors"), components)
    assert {path: base.shape(ModuleRef("text_encoder", path)) for path in base.modules("text_encoder")} == {
        path: shape for path, shape in module_names("sd15", "text_encoder").items() if len(shape) > 1
    }
    assert family_of_base(base) == family
    modules = ["down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in"]
    updates = {ModuleRef("unet", path): made_for(base, path) for path in modules}
    check_families(Adapter(updates, "diffusers", family=family), base, base)
    assert set(locate(Adapter(updates, "diffusers"), base, "old").modules) == set(updates)


def made_for(base: Base, path: str) -> LowRank:
    out, width = base.shape(ModuleRef("unet", path))[:2]
    return LowRank(InMemory(torch.ones(out, 1)), InMemory(torch.ones(1, width)), 1.0)


def test_other_files_stay_one_model() -> None:
    tensors = {name: InMemory(tensor) for name, tensor in llama().items()}
    assert split_components(tensors) == ({MODEL: tensors}, ())
