"""Any diffusers or transformers model is known by its config alone: names and shapes of the real class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from truth import listed

from regraft.errors import InputError
from regraft.families import families, table
from regraft.families.generic import parameters_of, read_config

TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
CLIP = {"model_type": "clip_text_model", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(("config", "real"), [(TINYLLAMA, "tinyllama-1.1b"), (QWEN, "qwen2.5-0.5b")])
def test_a_language_model_has_the_parameters_of_its_released_files(config: dict[str, Any], real: str) -> None:
    assert parameters_of(config) == {name: tuple(shape) for name, shape in listed(real)["params"].items()}


def test_a_class_can_be_known_by_its_model_type_alone() -> None:
    names = parameters_of(CLIP)
    assert names["encoder.layers.1.self_attn.q_proj.weight"] == (64, 64)


TABLES = sorted({name for family in families().values() for name in family.components.values()})


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_what_its_config_makes(name: str) -> None:
    one = table(name)
    library, kind = one.data["class"].split(".")
    known = {"_class_name": kind} if library == "diffusers" else {"architectures": [kind]}
    made = parameters_of({**one.data["config"], **known})
    # Files and older libraries have this level; transformers 5 leaves it out of CLIPTextModel.
    level = "text_model." if kind == "CLIPTextModel" else ""
    assert {name if name.startswith(level) else level + name: shape for name, shape in made.items()} == one.parameters


def test_a_diffusers_model_needs_no_table() -> None:
    config = {
        "_class_name": "AuraFlowTransformer2DModel",
        "_diffusers_version": "0.36.0",
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
    }
    names = parameters_of(config)
    assert names["single_transformer_blocks.0.attn.to_q.weight"] == (16, 16)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "NoSuchTransformer"}, "has no model class NoSuchTransformer"),
        ({"_class_name": "FluxPipeline"}, "has no model class FluxPipeline"),
        ({"_class_name": "torch"}, "has no model class torch"),
        ({"architectures": ["NoSuchForCausalLM"]}, "has no model class NoSuchForCausalLM"),
        ({"architectures": ["pipeline"], "auto_map": {"AutoModel": "evil.Model"}}, "is never run"),
        ({"model_type": "custom", "auto_map": {"AutoModel": "evil.Model"}}, "is never run"),
        ({}, "has no model class no class"),
        ({**TINYLLAMA, "num_hidden_layers": 10**9}, "is no number of layers"),
        ({**TINYLLAMA, "hidden_size": -4}, "do not make a model"),
        ({**TINYLLAMA, "hidden_size": "wide"}, "do not make a model"),
        ({**TINYLLAMA, "vocab_size": 10**11}, "absurd size"),
    ],
)
def test_what_makes_no_model_is_said_plainly(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parameters_of(config, file="config.json")


def test_a_config_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CLIP))
    assert read_config(tmp_path) == CLIP
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="object of settings"):
        read_config(tmp_path)
