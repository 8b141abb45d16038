from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.errors import InputError
from regraft.formats import load_adapter
from regraft.probes.controls import random_like
from regraft.runtime import applied, fitting, load_model
from regraft.tensors import InMemory
from regraft.updates import Full, LowRank

IDS = torch.arange(12).reshape(2, 6)


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"use_dora": True}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("bert", {"lora_bias": True}),
        ("gpt2", {}),
        ("gpt2", {"use_dora": True}),
        ("unet", {}),
    ],
)
def test_an_adapter_that_peft_saved_gives_what_peft_merges(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    make, targets = {
        "llama": (tiny.llama, ["q_proj", "down_proj"]),
        "bert": (tiny.bert, ["query", "dense"]),
        "gpt2": (tiny.gpt2, ["c_attn"]),
        "unet": (tiny.unet, ["to_q", "conv1", "proj_in"]),
    }[family]
    folder = make(tmp_path / "base")
    loaded = load_model(folder)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options)
    torch.manual_seed(0)
    wrapped = get_peft_model(load_model(folder).main, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name or "modules_to_save" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path / "lora")
    inputs = (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, 8)) if family == "unet" else (IDS,)
    with torch.no_grad():
        plain = loaded.main(*inputs)[0]
        with applied(loaded.components, load_adapter(tmp_path / "lora")):
            ours = loaded.main(*inputs)[0]
        theirs = wrapped.merge_and_unload()(*inputs)[0]
    assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))
    assert (ours - plain).abs().max() > 1e-2


def test_the_weights_come_back_bit_for_bit_even_after_an_error(tmp_path: Path) -> None:
    loaded = load_model(tiny.bert(tmp_path / "base"))
    before, identities = _weights(loaded.main), {n: id(p) for n, p in loaded.main.named_parameters()}
    adapter = tiny.lora(loaded.main, ["query", "dense"])
    with pytest.raises(RuntimeError), applied(loaded.components, adapter):
        loaded.main.pooler.dense(torch.full((1, 3), 0.0))
    with applied(loaded.components, adapter):
        assert not torch.equal(loaded.main.state_dict()["pooler.dense.weight"], before["pooler.dense.weight"])
    assert all(torch.equal(value, before[name]) for name, value in loaded.main.state_dict().items())
    assert {n: id(p) for n, p in loaded.main.named_parameters()} == identities


def test_a_tied_weight_changes_only_where_the_adapter_names_it(tmp_path: Path) -> None:
    loaded = load_model(tiny.gpt2(tmp_path / "base"))
    embedding = loaded.main.transformer.wte.weight
    assert loaded.main.lm_head.weight is embedding
    with applied(loaded.components, tiny.lora(loaded.main, ["lm_head"])):
        assert loaded.main.transformer.wte.weight is embedding
        assert not torch.equal(loaded.main.lm_head.weight, embedding)
    assert loaded.main.lm_head.weight is embedding


@pytest.mark.parametrize("prefix", ["bert.", "model.bert."])
def test_a_prefix_more_or_less_is_no_obstacle(prefix: str, tmp_path: Path) -> None:
    loaded = load_model(tiny.bert(tmp_path / "base"))
    adapter = tiny.lora(loaded.main, ["query"])
    renamed = replace(adapter, updates={ModuleRef(c, prefix + p): u for (c, p), u in adapter.updates.items()})
    with applied(loaded.components, adapter):
        expected = _weights(loaded.main)
    with applied(loaded.components, renamed):
        assert all(torch.equal(value, expected[name]) for name, value in loaded.main.state_dict().items())


def test_missing_modules_and_other_shapes_are_named(tmp_path: Path) -> None:
    loaded = load_model(tiny.bert(tmp_path / "base"))
    wider = load_model(tiny.bert(tmp_path / "wider", width=32))
    adapter = tiny.lora(loaded.main, ["query"])
    other = replace(adapter, updates={ModuleRef(MODEL, "no.such.module"): next(iter(adapter.updates.values()))})
    with pytest.raises(InputError, match=r"no place for 1 of the adapter's 1 modules \(no.such.module: no such module"):
        applied(loaded.components, other).__enter__()
    with pytest.raises(InputError, match=r"its shape is \(32, 32\), the adapter's \(16, 16\)"):
        applied(wider.components, adapter).__enter__()
    two = replace(adapter, updates={ModuleRef(c, p): u for c in ("unet", "text_encoder") for (_, p), u in
                                    adapter.updates.items()})  # fmt: skip
    with pytest.raises(InputError, match="there is no unet"):
        applied(loaded.components, two).__enter__()
    assert not fitting(wider.components, adapter).updates
    assert fitting(loaded.components, adapter).updates == adapter.updates


def test_a_whole_parameter_is_replaced_and_may_bring_added_tokens(tmp_path: Path) -> None:
    loaded = load_model(tiny.llama(tmp_path / "base"))
    table = torch.randn(50, 16)
    adapter = Adapter(
        {
            ModuleRef(MODEL, "model.embed_tokens.weight"): Full(InMemory(table), "k"),
            ModuleRef(MODEL, "model.norm.weight"): Full(InMemory(torch.full((16,), 2.0)), "n"),
        },
        format="peft",
    )
    with torch.no_grad(), applied(loaded.components, adapter):
        loaded.main(torch.tensor([[49]]))
        assert torch.equal(loaded.main.model.embed_tokens.weight, table)
        assert torch.equal(loaded.main.model.norm.weight, torch.full((16,), 2.0))
    assert loaded.main.model.embed_tokens.weight.shape == (48, 16)


def test_the_random_control_has_the_ranks_and_norms_of_its_model_and_is_repeatable(tmp_path: Path) -> None:
    loaded = load_model(tiny.unet(tmp_path / "base"))
    adapter = tiny.lora({"unet": loaded.main}, ["to_q", "conv1", "proj_in"])
    full = ModuleRef("unet", "conv_in.bias")
    adapter = replace(adapter, updates={**adapter.updates, full: Full(InMemory(torch.ones(8)), "b")})
    once, again = random_like(loaded.components, adapter, 3), random_like(loaded.components, adapter, 3)
    assert list(once.updates) == list(adapter.updates)
    for ref, update in adapter.updates.items():
        made, repeated = once.updates[ref], again.updates[ref]
        assert made.rank == update.rank
        assert made.shape == update.shape
        if isinstance(update, LowRank) and isinstance(made, LowRank) and isinstance(repeated, LowRank):
            assert made.norm() == pytest.approx(update.norm(), rel=1e-4)
            assert torch.equal(made.delta(), repeated.delta())
            overlap = (made.delta() * update.delta()).sum() / (made.norm() * update.norm())
            assert abs(float(overlap)) < 0.7
    old = loaded.main.conv_in.bias
    new = once.updates[full]
    assert isinstance(new, Full)
    assert (new.value.load() - old).norm() == pytest.approx(float((torch.ones(8) - old).norm()), rel=1e-4)


def test_a_single_models_adapter_goes_to_the_component_that_has_its_modules(tmp_path: Path) -> None:
    models = load_model(tiny.pipeline(tmp_path / "base")).components
    as_model = tiny.lora(models["text_encoder"], ["q_proj", "v_proj", "fc1"])
    named = replace(as_model, updates={ModuleRef("text_encoder", path): u for (_, path), u in as_model.updates.items()})
    with applied(models, named):
        expected = _weights(models["text_encoder"])
    before = _weights(models["unet"])
    with applied(models, as_model):
        assert all(torch.equal(v, expected[name]) for name, v in models["text_encoder"].state_dict().items())
        assert all(torch.equal(v, before[name]) for name, v in models["unet"].state_dict().items())
    assert fitting(models, as_model).updates == as_model.updates


def test_of_two_components_with_its_names_an_adapter_goes_to_the_one_with_its_shapes(tmp_path: Path) -> None:
    narrow, wide = (load_model(tiny.bert(tmp_path / str(width), width=width)).main for width in (16, 32))
    adapter = tiny.lora(wide, ["query", "value"])
    models, before = {"text_encoder": narrow, "text_encoder_2": wide}, _weights(narrow)
    with applied(models, adapter):
        assert all(torch.equal(value, before[name]) for name, value in narrow.state_dict().items())
        changed = wide.encoder.layer[0].attention.self.query.weight
    assert not torch.equal(changed, wide.encoder.layer[0].attention.self.query.weight)
