"""Older and rarer spellings of keys: read as the module that they mean, written as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft import ModuleRef, load_adapter
from regraft.updates import LowRank

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0.self_attn"
TEXT_Q = f"text_encoder.{TEXT}.q_proj"


def pair(up: str, down: str, out: int = 320, into: int = 320) -> dict[str, Tensor]:
    return {up: torch.randn(out, 4), down: torch.randn(4, into)}


def processor(prefix: str, part: str) -> dict[str, Tensor]:
    return pair(f"{prefix}to_{part}_lora.up.weight", f"{prefix}to_{part}_lora.down.weight")


CASES: dict[str, tuple[dict[str, Tensor], dict[tuple[str, str], float], dict[str, str]]] = {
    "attention processors": (
        processor(f"unet.{ATTENTION}.processor.", "q") | processor(f"unet.{ATTENTION}.processor.", "out"),
        {("unet", f"{ATTENTION}.to_q"): 1.0, ("unet", f"{ATTENTION}.to_out.0"): 1.0},
        {},
    ),
    "no component": (
        processor(f"{ATTENTION}.processor.", "q") | processor(f"{ATTENTION}.processor.", "out"),
        {("unet", f"{ATTENTION}.to_q"): 1.0, ("unet", f"{ATTENTION}.to_out.0"): 1.0},
        {},
    ),
    "text encoder's attention": (
        processor(f"text_encoder.{TEXT}.", "q") | processor(f"text_encoder.{TEXT}.", "out"),
        {("text_encoder", f"{TEXT}.q_proj"): 1.0, ("text_encoder", f"{TEXT}.out_proj"): 1.0},
        {},
    ),
    "three generations in one file": (
        pair("unet.conv_a.lora_B.weight", "unet.conv_a.lora_A.weight")
        | pair(f"unet.{ATTENTION}.to_q.lora.up.weight", f"unet.{ATTENTION}.to_q.lora.down.weight")
        | pair(f"unet.{ATTENTION}.to_k.lora_B.weight", f"unet.{ATTENTION}.to_k.lora_A.weight")
        | pair(
            f"text_encoder.{TEXT}.q_proj.lora_linear_layer.up.weight",
            f"text_encoder.{TEXT}.q_proj.lora_linear_layer.down.weight",
        )
        | pair(f"text_encoder.{TEXT}.k_proj.lora_B.weight", f"text_encoder.{TEXT}.k_proj.lora_A.weight"),
        {
            ("unet", "conv_a"): 1.0,
            ("unet", f"{ATTENTION}.to_q"): 1.0,
            ("unet", f"{ATTENTION}.to_k"): 1.0,
            ("text_encoder", f"{TEXT}.q_proj"): 1.0,
            ("text_encoder", f"{TEXT}.k_proj"): 1.0,
        },
        {},
    ),
    "alpha beside some pairs": (
        pair("unet.a.lora_B.weight", "unet.a.lora_A.weight")
        | pair("unet.b.lora_B.weight", "unet.b.lora_A.weight")
        | {"unet.a.alpha": torch.tensor(2.0)},
        {("unet", "a"): 0.5, ("unet", "b"): 1.0},
        {},
    ),
    "magnitudes in three spellings": (
        pair("unet.a.lora_B.weight", "unet.a.lora_A.weight")
        | pair("unet.b.lora_B.weight", "unet.b.lora_A.weight")
        | pair("unet.c.lora_B.weight", "unet.c.lora_A.weight", into=80)
        | {"unet.a.lora_magnitude_vector": torch.rand(320), "unet.b.lora_magnitude_vector.weight": torch.rand(320)}
        | {"unet.c.dora_scale": torch.rand(1, 80)},
        {("unet", "a"): 1.0, ("unet", "b"): 1.0, ("unet", "c"): 1.0},
        {},
    ),
    "patterns of each component in the header": (
        pair("unet.x.a.lora_B.weight", "unet.x.a.lora_A.weight")
        | pair("unet.x.b.lora_B.weight", "unet.x.b.lora_A.weight")
        | pair("text_encoder_2.a.lora_B.weight", "text_encoder_2.a.lora_A.weight"),
        {("unet", "x.a"): 3.0, ("unet", "x.b"): 1.0, ("text_encoder_2", "a"): 4.0},
        {
            "lora_adapter_metadata": json.dumps(
                {
                    **{"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {"a": 12}, "unet.rank_pattern": {}},
                    **{"text_encoder_2.r": 4, "text_encoder_2.lora_alpha": 8, "text_encoder_2.use_rslora": True},
                    **{"unet.use_dora": False, "text_encoder_2.use_dora": False},
                },
                indent=2,
                sort_keys=True,
            )
        },
    ),
    "PEFT without a config": (
        pair("base_model.model.a.lora_B.weight", "base_model.model.a.lora_A.weight"),
        {("model", "a"): 1.0},
        {"format": "pt"},
    ),
    "PEFT's raw state dict": (
        pair("base_model.model.a.lora_B.style.weight", "base_model.model.a.lora_A.style.weight")
        | {"base_model.model.e.lora_embedding_A.style": torch.rand(4, 9)}
        | {"base_model.model.e.lora_embedding_B.style": torch.rand(5, 4)}
        | {"base_model.model.head.modules_to_save.style.weight": torch.rand(3, 3)},
        {("model", "a"): 1.0, ("model", "e"): 1.0, ("model", "head.weight"): 1.0},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_spelling_is_understood_and_kept(case: str, tmp_path: Path) -> None:
    tensors, modules, metadata = CASES[case]
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source, metadata=metadata)
    adapter = load_adapter(source)
    assert adapter.unrecognised == ()
    scales = {m: u.scale if isinstance(u, LowRank) else 1.0 for m, u in adapter.updates.items()}
    assert scales == {ModuleRef(*module): scale for module, scale in modules.items()}

    adapter.save(target)
    again = load_file(target)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_an_embedding_is_given_as_the_base_has_it(tmp_path: Path) -> None:
    a, b = torch.rand(4, 9), torch.rand(5, 4)
    keys = ("base_model.model.e.lora_embedding_A", "base_model.model.e.lora_embedding_B")
    save_file(dict(zip(keys, (a, b), strict=True)), tmp_path / "e.safetensors")
    update = load_adapter(tmp_path / "e.safetensors").updates[ModuleRef("model", "e")]
    assert isinstance(update, LowRank)
    assert (update.shape, update.orientation) == ((9, 5), "embedding")
    assert torch.allclose(update.delta(), (b @ a).T)


def folder(path: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    full = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["a"], **config}
    (path / "adapter_config.json").write_text(json.dumps(full))
    return path


A = pair("base_model.model.a.lora_B.weight", "base_model.model.a.lora_A.weight")


def test_what_lies_beside_the_weights_is_carried(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", A, lora_dropout=0.25, someday="new field")
    (source / "README.md").write_text("mine")
    (source / "tokenizer.json").write_text("{}")
    load_adapter(source).save(tmp_path / "out")
    names = {"README.md", "tokenizer.json", "adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_dropout"], config["someday"]) == (0.25, "new field")


def test_a_state_dict_saved_by_torch_is_read(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", A)
    (source / "adapter_model.safetensors").unlink()
    torch.save(A, source / "adapter_model.bin")
    load_adapter(source).save(tmp_path / "out")
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], A[key]) for key in A)


def test_experts_stacked_in_one_pair_are_not_taken_for_a_product(tmp_path: Path) -> None:
    experts = pair("base_model.model.moe.experts.lora_B.weight", "base_model.model.moe.experts.lora_A.weight")
    adapter = load_adapter(folder(tmp_path / "in", A | experts, target_parameters=["moe.experts.down_proj"]))
    assert list(adapter.updates) == [ModuleRef("model", "a")]
    assert set(adapter.unrecognised) == set(experts)


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "ADALORA"])
def test_a_config_of_another_tuner_is_not_read_as_lora(kind: str, tmp_path: Path) -> None:
    adapter = load_adapter(folder(tmp_path / "in", A, peft_type=kind))
    assert dict(adapter.updates) == {}
    assert set(adapter.unrecognised) == set(A)


def test_the_family_of_a_language_model_follows_the_config(tmp_path: Path) -> None:
    keys = ("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",)
    tensors = pair(keys[0], keys[0].replace("lora_B", "lora_A"))
    for number, (name, family) in enumerate((("Qwen/Qwen2.5-0.5B", "qwen2"), ("", "llama"))):
        source = folder(tmp_path / str(number), tensors, base_model_name_or_path=name)
        assert load_adapter(source).family == family
