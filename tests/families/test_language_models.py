"""Language models are told by patterns: bases and adapters of tiny real models, and llama.cpp's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers

from regraft.base import Base
from regraft.families import (
    family_of_base,
    family_of_modules,
    get_family,
    gguf_architecture,
    gguf_families,
    gguf_names,
    recognise,
)
from regraft.tensors import InMemory

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
}
GPT2: dict[str, Any] = {"vocab_size": 16, "n_embd": 8, "n_layer": 12, "n_head": 2, "n_positions": 8}
T5: dict[str, Any] = {"vocab_size": 16, "d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 12}
DISTIL: dict[str, Any] = {"vocab_size": 16, "dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2}

# family → (class, sizes, what an adapter of it is recognised as by its names alone)
MODELS = {
    "llama": ("LlamaForCausalLM", SIZES, "llama"),
    "mistral": ("MistralForCausalLM", {**SIZES, "head_dim": 4}, "llama"),
    "qwen2": ("Qwen2ForCausalLM", SIZES, "llama"),
    "qwen3": ("Qwen3ForCausalLM", SIZES, "llama"),
    "gemma": ("GemmaForCausalLM", SIZES, "llama"),
    "gemma2": ("Gemma2ForCausalLM", SIZES, "llama"),
    "gemma3": ("Gemma3ForCausalLM", SIZES, "llama"),
    "phi": ("PhiForCausalLM", SIZES, "phi"),
    "phi3": ("Phi3ForCausalLM", {**SIZES, "pad_token_id": 0}, "phi3"),
    "gpt-neox": ("GPTNeoXForCausalLM", SIZES, "gpt-neox"),
    "gpt2": ("GPT2LMHeadModel", GPT2, "gpt2"),
    "bert": ("BertForSequenceClassification", SIZES, "bert"),
    "distilbert": ("DistilBertForSequenceClassification", DISTIL, "distilbert"),
    "t5": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, "t5"),
}


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    made = {}
    with torch.device("meta"):
        for family, (name, sizes, _) in MODELS.items():
            kind = getattr(transformers, name)
            made[family] = kind(kind.config_class(**sizes))
    return made


@pytest.mark.parametrize("family", MODELS)
def test_a_base_is_told_by_its_config(family: str, models: dict[str, torch.nn.Module]) -> None:
    config = {"model_type": models[family].config.model_type}
    tensors = {name: InMemory(value) for name, value in models[family].state_dict().items()}
    assert family_of_base(Base(Path("base"), {"model": tensors}, {"model": config})) == family


# Gemma 1 and Mistral have the very names of Llama.
@pytest.mark.parametrize("family", [family for family in MODELS if family not in ("gemma", "mistral")])
def test_a_base_without_config_is_told_by_its_names(family: str, models: dict[str, torch.nn.Module]) -> None:
    tensors = {name: InMemory(value) for name, value in models[family].state_dict().items()}
    assert family_of_base(Base(Path("base"), {"model": tensors}, {})) == family


@pytest.mark.parametrize("family", MODELS)
def test_an_adapter_of_all_linear_modules_is_told_by_their_names(
    family: str, models: dict[str, torch.nn.Module]
) -> None:
    linear = (torch.nn.Linear, torch.nn.Embedding, transformers.pytorch_utils.Conv1D)
    modules = {
        name: tuple(module.weight.shape)
        for name, module in models[family].named_modules()
        if isinstance(module, linear) and "relative" not in name
    }
    found = family_of_modules({"model": modules})
    assert found == MODELS[family][2]
    shared = get_family(found)
    own = get_family(family)
    assert shared is not None
    assert own is not None
    assert shared.naming == own.naming


@pytest.mark.parametrize("family", gguf_families())
def test_gguf_names_are_those_of_llama_cpps_own_table(family: str, models: dict[str, torch.nn.Module]) -> None:
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == gguf_architecture(family))
    table = gguf.get_tensor_name_map(arch, 12)
    names = gguf_names(family)
    found = 0
    for name in models[family].state_dict():
        plain = name.removeprefix("bert.")
        spelled = table.get_name(plain, try_suffixes=(".weight", ".bias"))
        # T5 has two names of its embedding; classifiers have no place in BERT's GGUF.
        if spelled is None or ("embed_tokens" in name and family == "t5") or name.startswith("classifier"):
            continue
        assert names.spelled(plain) == spelled
        assert names.canonical(spelled) == plain
        found += 1
    assert found >= 0.8 * len(models[family].state_dict()) - 2


def test_gguf_names_of_modules_are_those_of_parameters_without_weight() -> None:
    assert gguf_names("llama").canonical("blk.11.ffn_down") == "model.layers.11.mlp.down_proj"
    assert gguf_names("llama").spelled("model.layers.0.self_attn.o_proj") == "blk.0.attn_output"
    assert gguf_names("llama").canonical("blk.0.unknown") is None


def test_a_gguf_adapter_is_recognised_by_its_names_and_architecture() -> None:
    names = {"": {f"blk.{i}.attn_{x}": (8, 8) for i in range(3) for x in "qkv"}}
    for metadata, family in [
        ({}, "llama"),
        ({"general.architecture": "qwen2"}, "qwen2"),
        ({"general.architecture": "llama", "config": "mistralai/Mistral-7B"}, "mistral"),
    ]:
        found = recognise(names, metadata)
        assert found is not None
        assert (found.family, found.matches[""].scheme) == (family, "gguf")
