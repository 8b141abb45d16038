"""Folders as users have them: variants, shards, quantised components, links, and files without a usual name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from regraft import InputError, open_base
from regraft.adapter import MODEL
from toys import llama

STATE = {"a.weight": torch.ones(3, 2), "b.weight": torch.zeros(2, 2)}


def save(file: Path, state: dict[str, Tensor] | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    (torch.save if file.suffix == ".bin" else save_file)(STATE if state is None else state, file)


def shards(folder: Path, stem: str = "model", suffix: str = ".safetensors", variant: str = "") -> Path:
    names = list(STATE)
    files = [f"{stem}{variant}-{i + 1:05}-of-00002{suffix}" for i in range(2)]
    for name, file in zip(names, files, strict=True):
        save(folder / file, {name: STATE[name]})
    index = folder / f"{stem}{suffix}.index{variant}.json"
    index.write_text(json.dumps({"weight_map": dict(zip(names, files, strict=True))}))
    return index


def test_components_of_one_folder_may_lie_in_different_ways(tmp_path: Path) -> None:
    save(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    save(tmp_path / "text_encoder" / "pytorch_model.bin")
    shards(tmp_path / "text_encoder_2")
    shards(tmp_path / "transformer", "diffusion_pytorch_model", variant=".fp16")
    save(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    base = open_base(tmp_path)
    assert set(base.components) == {"unet", "text_encoder", "text_encoder_2", "transformer"}
    for part in base.components.values():
        assert {name: ref.load().tolist() for name, ref in part.items()} == {n: t.tolist() for n, t in STATE.items()}
    assert set(base.description.split(", ")) == {"safetensors", "PyTorch"}


@pytest.mark.parametrize(
    ("held", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.bin"], "model.fp16.safetensors"),
        (["model.safetensors", "consolidated.safetensors"], "model.safetensors"),
        (["model.bf16.safetensors"], "model.bf16.safetensors"),
        (["odd-name.safetensors", "notes.bin"], "odd-name.safetensors"),
    ],
)
def test_one_file_of_several_is_chosen_as_the_libraries_do(tmp_path: Path, held: list[str], chosen: str) -> None:
    for file in held:
        save(tmp_path / file, {"x.weight": torch.full((2, 2), float(file == chosen))})
    assert float(open_base(tmp_path).components[MODEL]["x.weight"].load()[0, 0]) == 1.0


def test_shards_win_over_a_consolidated_copy_beside_them(tmp_path: Path) -> None:
    shards(tmp_path)
    save(tmp_path / "consolidated.safetensors", {"layers.0.weight": torch.ones(2, 2)})
    assert set(open_base(tmp_path).components[MODEL]) == set(STATE)


def test_a_quantised_component_is_shown_beside_a_plain_one(tmp_path: Path) -> None:
    values = torch.randn(40, 24).to(torch.float8_e4m3fn)
    quantised = {"x.weight": values, "x.weight_scale_inv": torch.rand(3, 2)}
    save(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", quantised)
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"quantization_config": settings}))
    save(tmp_path / "text_encoder" / "model.safetensors")
    base = open_base(tmp_path)
    assert base.components["transformer"]["x.weight"].shape == (40, 24)
    assert base.components["transformer"]["x.weight"].dtype == torch.float32
    assert base.description == "safetensors, scaled fp8"
    assert base.left_out == ()


def test_what_stands_in_quantize_config_counts(tmp_path: Path) -> None:
    words = torch.full((4, 16), 0x33333333, dtype=torch.int32)
    zeros = torch.full((1, 2), 0x22222222, dtype=torch.int32)
    save(tmp_path / "model.safetensors", {"x.qweight": words, "x.qzeros": zeros, "x.scales": torch.ones(1, 16)})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    first = open_base(tmp_path).components[MODEL]["x.weight"].load()
    (tmp_path / "quantize_config.json").write_text('{"checkpoint_format": "gptq_v2"}')
    second = open_base(tmp_path).components[MODEL]["x.weight"].load()
    # 3 - (2 + 1), and 3 - 2.
    assert (float(first.unique()), float(second.unique())) == (0.0, 1.0)


def test_an_only_gguf_in_a_folder_is_the_model(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for part in ("-00001-of-00002", "-00002-of-00002"):
        writer = gguf.GGUFWriter(tmp_path / f"m{part}.gguf", "llama")
        writer.add_tensor(f"blk.{part[5]}.attn_v.weight", torch.ones(2, 2).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert len(open_base(tmp_path).components[MODEL]) == 2


def test_a_quantisation_that_is_not_known_is_named_and_left_alone(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    base = open_base(tmp_path)
    assert base.description == "safetensors, mxfp4 (as stored)"
    assert set(base.components[MODEL]) == set(STATE)


@pytest.mark.parametrize("inner", ["state_dict", "module"])
def test_weights_beside_a_trainers_own_state_are_found(tmp_path: Path, inner: str) -> None:
    torch.save({inner: STATE, "epoch": 3}, tmp_path / "m.pt")
    assert set(open_base(tmp_path / "m.pt").components[MODEL]) == set(STATE)


# ---- links


def linked(folder: Path, name: str, target: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("what", ["shard", "index", "file"])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "base"
    if what == "file":
        save(tmp_path / "elsewhere" / "secret.safetensors")
        linked(folder, "model.safetensors", tmp_path / "elsewhere" / "secret.safetensors")
        name = "model.safetensors"
    else:
        index = shards(folder)
        name = index.name if what == "index" else "model-00001-of-00002.safetensors"
        (tmp_path / "elsewhere").mkdir()
        (folder / name).rename(tmp_path / "elsewhere" / name)
        linked(folder, name, tmp_path / "elsewhere" / name)
    with pytest.raises(InputError, match="is a link that leaves its folder") as refused:
        open_base(folder)
    assert str(folder / name) in str(refused.value)


def test_a_link_within_the_folder_and_a_linked_folder_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "base" / "unet" / "weights.safetensors")
    linked(tmp_path / "base" / "unet", "diffusion_pytorch_model.safetensors", Path("weights.safetensors"))
    (tmp_path / "link").symlink_to(tmp_path / "base")
    assert set(open_base(tmp_path / "link").components["unet"]) == set(STATE)


def test_the_hubs_cache_is_followed_to_its_own_blobs_only(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    index = shards(tmp_path / "whole")
    names = [index.name, *sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))]
    snapshot = repository / "snapshots" / "0123abcd"
    for number, name in enumerate(names):
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        (tmp_path / "whole" / name).rename(repository / "blobs" / f"b{number}")
        linked(snapshot, name, Path("..") / ".." / "blobs" / f"b{number}")
    assert set(open_base(snapshot).components[MODEL]) == set(STATE)
    (tmp_path / "other" / "blobs").mkdir(parents=True)
    (repository / "blobs" / "b1").rename(tmp_path / "other" / "blobs" / "b1")
    (snapshot / names[1]).unlink()
    linked(snapshot, names[1], tmp_path / "other" / "blobs" / "b1")
    with pytest.raises(InputError, match="leaves its folder"):
        open_base(snapshot)


@pytest.mark.parametrize(
    ("file", "description"),
    [("m.safetensors", "safetensors"), ("m.bin", "PyTorch"), ("model.safetensors", "safetensors")],
)
def test_a_base_says_how_it_lies_on_disk(tmp_path: Path, file: str, description: str) -> None:
    save(tmp_path / file, llama())
    assert open_base(tmp_path if file.startswith("model") else tmp_path / file).description == description
