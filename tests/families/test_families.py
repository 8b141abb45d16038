"""Families: their tables agree with lists made from the real models, and adapters and bases are told by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from truth import listed

from regraft.base import Base
from regraft.families import (
    aliases,
    block_names,
    block_of,
    families,
    family_of_base,
    family_of_modules,
    module_names,
    refine_by_hint,
    same_naming,
)
from regraft.tensors import InMemory, Shape


def weights(name: str) -> dict[str, Shape]:
    params = listed(name)["params"]
    return {key.removesuffix(".weight"): tuple(shape) for key, shape in params.items() if key.endswith(".weight")}


TABLES = [
    ("sd15", "unet", "sd15-unet"),
    ("sd15", "text_encoder", "sd15-text-encoder"),
    ("sdxl", "unet", "sdxl-unet"),
    ("sdxl", "text_encoder", "sd15-text-encoder"),
    ("sdxl", "text_encoder_2", "sdxl-text-encoder-2"),
]


@pytest.mark.parametrize(("family", "component", "name"), TABLES)
def test_a_table_holds_every_module_of_the_real_model(family: str, component: str, name: str) -> None:
    assert module_names(family, component) == weights(name)


@pytest.mark.parametrize(("family", "name"), [("sd15", "sd15-unet.original"), ("sdxl", "sdxl-unet.original")])
def test_the_original_names_are_those_of_the_real_converter(family: str, name: str) -> None:
    mapping = {new.removesuffix(".weight"): old for old, new in listed(name)["map"].items() if new.endswith(".weight")}
    assert aliases(family, "unet") == {path: old.removesuffix(".weight") for path, old in mapping.items()}


def base(component: str, shapes: dict[str, Shape], config: dict[str, Any] | None = None) -> Base:
    tensors = {f"{path}.weight": InMemory(torch.empty(shape, device="meta")) for path, shape in shapes.items()}
    return Base(Path("base"), {component: tensors}, {component: config or {}})


def test_bases_are_told_by_names_and_shapes() -> None:
    for component in ("unet", "model"):
        assert family_of_base(base(component, module_names("sd15", "unet"))) == "sd15"
        assert family_of_base(base(component, module_names("sdxl", "unet"))) == "sdxl"
    assert family_of_base(base("model", module_names("sdxl", "text_encoder"))) == "clip-l"
    narrow = {path: (shape[0] // 2, *shape[1:]) for path, shape in module_names("sd15", "unet").items()}
    assert family_of_base(base("unet", narrow)) == "unet"
    assert family_of_base(base("model", {"encoder.one": (2, 2)})) is None


def test_an_inpainting_unet_is_of_its_family() -> None:
    assert family_of_base(base("unet", {**module_names("sd15", "unet"), "conv_in": (320, 9, 3, 3)})) == "sd15"
    modules = {"conv_in": (320, 9, 3, 3), "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (1280, 768)}
    assert family_of_modules({"unet": modules}) == "sd15"


def test_a_single_file_checkpoint_is_told_by_the_original_names() -> None:
    one = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k": (320, 768)}
    xl = {"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k": (640, 2048)}
    assert family_of_base(base("model", one)) == "sd15"
    assert family_of_base(base("model", xl)) == "sdxl"


LLAMA = {"model.layers.0.self_attn.o_proj": (8, 8), "model.layers.0.mlp.gate_proj": (8, 8)}


@pytest.mark.parametrize(("kind", "family"), [("llama", "llama"), ("mistral", "mistral"), ("qwen2", "qwen2")])
def test_the_config_of_a_base_tells_families_of_one_naming_apart(kind: str, family: str) -> None:
    assert family_of_base(base("model", LLAMA, {"model_type": kind})) == family


ADAPTERS = [
    ("sd15", {"unet": {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (1280, 768)}}),
    ("sdxl", {"unet": {"mid_block.attentions.0.transformer_blocks.9.attn2.to_k": (1280, 2048)}}),
    ("sd15", {"model": {"down_blocks.0.attentions.0.proj_in": (320, 320)}}),
    ("unet", {"unet": {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (64, 32)}}),
    ("sd2", {"unet": {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (1280, 1024)}}),
    ("clip-l", {"text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj": (768, 768)}}),
    ("clip-text", {"text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj": (64, 64)}}),
    ("clip-l", {"text_encoder": {"encoder.layers.0.mlp.fc1": (3072, 768)}}),
    ("llama", {"model": {"model.layers.3.self_attn.q_proj": (64, 64), "lm_head": (99, 64)}}),
    ("gpt2", {"model": {"transformer.h.0.attn.c_attn": (64, 192)}}),
    ("bert", {"model": {"bert.encoder.layer.0.attention.self.query": (64, 64)}}),
    ("t5", {"model": {"encoder.block.0.layer.0.SelfAttention.q": (64, 64)}}),
    ("flux", {"transformer": {"single_transformer_blocks.3.attn.to_q": (3072, 3072)}}),
    ("hunyuan-video", {"transformer": {"single_transformer_blocks.39.attn.to_q": (3072, 3072)}}),
    ("wan", {"transformer": {"blocks.0.attn1.to_q": (5120, 5120), "blocks.0.ffn.net.0.proj": (13824, 5120)}}),
    (None, {"model": {"some.layer": (4, 4)}}),
    (None, {}),
]


@pytest.mark.parametrize(("family", "modules"), ADAPTERS)
def test_adapters_are_told_by_names_and_shapes(family: str | None, modules: dict[str, dict[str, Shape]]) -> None:
    assert family_of_modules(modules) == family


def test_a_config_hint_refines_a_family_of_one_naming() -> None:
    assert refine_by_hint("llama", "Qwen/Qwen2.5-0.5B") == "qwen2"
    assert refine_by_hint("llama", "MistralForCausalLM") == "mistral"
    assert refine_by_hint("llama", "") == "llama"
    assert refine_by_hint("sd15", "mistral") == "sd15"


def test_only_families_that_names_can_tell_apart_are_of_different_naming() -> None:
    assert same_naming("llama", "qwen2")
    assert same_naming("unet", "sd15")
    assert same_naming(None, "sd15")
    assert not same_naming("sd15", "sdxl")
    assert not same_naming("llama", "bert")


@pytest.mark.parametrize(
    ("family", "module", "block"),
    [
        ("sd15", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "IN01"),
        ("sd15", "down_blocks.2.attentions.1.proj_in", "IN08"),
        ("sd15", "mid_block.attentions.0.proj_out", "M00"),
        ("sd15", "up_blocks.1.attentions.0.proj_in", "OUT03"),
        ("sd15", "up_blocks.3.attentions.2.proj_in", "OUT11"),
        ("sd15", "down_blocks.0.downsamplers.0.conv", "IN03"),
        ("sd15", "text_encoder.text_model.encoder.layers.0.mlp.fc1", "BASE"),
        ("sd15", "time_embedding.linear_1", None),
        ("sdxl", "unet.down_blocks.1.attentions.0.proj_in", "IN04"),
        ("sdxl", "up_blocks.0.attentions.2.transformer_blocks.9.attn1.to_q", "OUT02"),
        ("sdxl", "text_encoder_2.text_model.encoder.layers.31.mlp.fc1", "BASE"),
        ("llama", "model.layers.0.self_attn.q_proj", None),
    ],
)
def test_a_module_counts_to_its_block(family: str, module: str, block: str | None) -> None:
    assert block_of(family, module) == block


@pytest.mark.parametrize(("family", "count"), [("sd15", 17), ("sd15", 26), ("sdxl", 12), ("sdxl", 20)])
def test_block_names_are_as_many_as_asked_for_and_all_occur(family: str, count: int) -> None:
    names = block_names(family, count)
    occurring = {block_of(family, path, "unet") for path in module_names(family, "unet")} | {"BASE"}
    assert names is not None
    assert len(names) == len(set(names)) == count
    assert set(names) <= occurring


def test_every_attention_of_the_unet_is_in_the_short_list_of_blocks() -> None:
    for family, count in (("sd15", 17), ("sdxl", 12)):
        inside = {block_of(family, path) for path in module_names(family, "unet") if "attentions" in path}
        assert {*inside, "BASE"} == set(block_names(family, count) or ())


def test_flattened_names_lead_back_to_one_module() -> None:
    for component in ("unet", "text_encoder", "text_encoder_2"):
        where: dict[str, str] = {}
        for family in families().values():
            names = {path: path for path in family.tables.get(component, {})}
            names |= {old: path for path, old in family.sgm.get(component, {}).items()}
            for spelling, path in names.items():
                assert where.setdefault(spelling.replace(".", "_"), path) == path
