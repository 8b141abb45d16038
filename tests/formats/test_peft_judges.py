"""PEFT itself says whether we read its files right, and loads what we write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from regraft import load_adapter
from regraft.updates import Full


def llama(**changes: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **{**sizes, **changes}))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.point = nn.Conv2d(3, 5, 1)
        self.out = nn.Linear(5, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        pixels = input_ids.float().reshape(1, 1, 2, 4).expand(1, 3, 2, 4) / 32
        return self.out(self.point(self.conv(pixels)).mean((2, 3)))


QV = ["q_proj", "v_proj"]
CASES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": QV, "r": 4, "lora_alpha": 8}),
    "rank pattern by suffix": (llama, {"target_modules": QV, "r": 4, "rank_pattern": {"q_proj": 2, "v_proj": 3}}),
    "rank and alpha patterns by expression": (
        llama,
        {
            "target_modules": QV,
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {r"layers\.0\..*_proj": 2, "^model.layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"1.self_attn.v_proj": 5, "q_proj": 7},
        },
    ),
    "rslora": (llama, {"target_modules": QV, "r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 9}}),
    "dora": (llama, {"target_modules": [*QV, "down_proj"], "r": 2, "use_dora": True}),
    "dora on square layers": (llama, {"target_modules": ["q_proj", "o_proj"], "r": 2, "use_dora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "lora_alpha": 5}),
    "dora on an embedding": (llama, {"target_modules": ["embed_tokens"], "r": 3, "use_dora": True}),
    "modules to save": (bert, {"target_modules": ["query", "value"], "r": 4, "modules_to_save": ["classifier"]}),
    "biases": (bert, {"target_modules": ["query", "value"], "r": 4, "bias": "all"}),
    "bias of B": (bert, {"target_modules": ["query", "dense"], "r": 4, "lora_alpha": 2, "lora_bias": True}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 4, "lora_alpha": 2, "fan_in_fan_out": True}),
    "dora on conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "r": 4, "use_dora": True, "fan_in_fan_out": True}),
    "dora on square conv1d": (
        gpt2,
        {"target_modules": ["attn.c_proj"], "r": 4, "use_dora": True, "fan_in_fan_out": True},
    ),
    "convolutions": (Convolutions, {"target_modules": ["conv", "point", "out"], "r": 2, "lora_alpha": 3}),
    "dora on convolutions": (Convolutions, {"target_modules": ["conv", "point", "out"], "r": 2, "use_dora": True}),
}


def trained(case: str) -> tuple[nn.Module, PeftModel]:
    """A base, and an adapter on a copy of it whose every tensor has a value."""
    torch.manual_seed(0)
    make, options = CASES[case]
    base = make()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            new = torch.randn_like(parameter) * 0.3
            parameter.data = parameter.data.abs() + new.abs() if "magnitude" in name else parameter.data + new
    return base, model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=torch.arange(8).reshape(1, 8))
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("case", CASES)
def test_our_merged_weights_are_those_of_merge_and_unload(case: str, tmp_path: Path) -> None:
    base, model = trained(case)
    model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    before = base.state_dict()
    expected = copy.deepcopy(model).merge_and_unload().state_dict()

    ours = {}
    for (_, path), update in adapter.updates.items():
        if isinstance(update, Full):
            # A copy of a targeted embedding stands beside the update of the same weight, which wins.
            ours.setdefault(path, update.merged(before[path]))
            continue
        ours[f"{path}.weight"] = update.merged(before[f"{path}.weight"])
        if update.bias is not None:
            ours[f"{path}.bias"] = before[f"{path}.bias"] + update.scale * update.bias.load()
    assert adapter.unrecognised == ()
    for name, value in expected.items():
        close = torch.allclose(ours.get(name, before[name]), value, atol=1e-5)
        assert close or name == "lm_head.weight", name


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_write_and_gives_the_same_outputs(case: str, tmp_path: Path) -> None:
    base, model = trained(case)
    model.save_pretrained(tmp_path / "adapter")
    load_adapter(tmp_path / "adapter").save(tmp_path / "again")

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()

    assert not torch.allclose(logits(base.eval()), logits(model), atol=1e-3)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_a_config_is_corrected_to_changed_ranks_and_names(tmp_path: Path) -> None:
    base, model = trained("rank and alpha patterns by expression")
    model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    # One module goes, the others are cut to rank 1: as a port may do it.
    updates = {}
    for module, update in list(adapter.updates.items())[1:]:
        up, down = update.factors()
        updates[module] = update.with_factors(up[:, :1], down[:1])
    replace(adapter, updates=updates).save(tmp_path / "cut")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "cut")
    merged = loaded.merge_and_unload().state_dict()
    for name, value in base.state_dict().items():
        module = next((m for m in updates if f"{m.path}.weight" == name), None)
        expected = value if module is None else updates[module].merged(value)
        assert torch.allclose(merged[name], expected, atol=1e-5), name
