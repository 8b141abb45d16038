"""GGUF LoRAs: transformers' own loading of GGUF bases and PEFT's own merge say whether they are right."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

gguf = pytest.importorskip("gguf")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from regraft import Adapter, InputError, ModuleRef, OutputError, load_adapter, open_base, port  # noqa: E402
from regraft.adapter import MODEL  # noqa: E402
from regraft.formats._gguf_write import write_gguf  # noqa: E402
from regraft.inspection import convert_adapter, inspect_adapter  # noqa: E402
from regraft.lineage import ports_of  # noqa: E402
from regraft.tensors import InMemory  # noqa: E402
from regraft.updates import Full, LowRank  # noqa: E402

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, list[str]] = {
    "llama": [*LINEAR, "embed_tokens", "lm_head"],
    "qwen2": LINEAR,
    "qwen3": LINEAR,
    "gemma2": LINEAR,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def config_for(model_type: str) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if model_type == "gpt2":
        sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    elif model_type == "bloom":
        sizes = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    elif model_type in ("gemma2", "qwen3"):
        sizes["head_dim"] = 8
    return AutoConfig.for_model(model_type, **sizes)


def fields_for(arch: str, config: Any) -> dict[str, Any]:
    sizes = {
        "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
        "attention.head_count": 4, "attention.head_count_kv": 4 if arch == "bloom" else 2,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5, "attention.sliding_window": 32,
        "rope.dimension_count": 8, "rope.freq_base": 10000.0, "vocab_size": 64, "attention.key_length": 8,
    }  # fmt: skip
    return {f"{arch}.{key}": value for key, value in sizes.items()}


def base_in_gguf(model: nn.Module, arch: str) -> dict[str, Tensor]:
    """A state dict under llama.cpp's names, its values as they come: whatever they are, they are some model's."""
    known = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(known, 2)
    out = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module == "lm_head" and model.config.tie_word_embeddings:
            continue
        transposed = arch == "gpt2" and kind == "weight" and module.endswith(("c_attn", "c_proj", "c_fc"))
        out[f"{names.get_name(module)}.{kind}"] = tensor.T.contiguous() if transposed else tensor
    return out


def as_transformers_loads(tensors: dict[str, Tensor], arch: str, config: Any, folder: Path) -> nn.Module:
    folder.mkdir()
    write_gguf(folder / "base.gguf", arch, fields_for(arch, config), tensors)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="base.gguf", config=copy.deepcopy(config))
    # As loaded it counts as quantised, and can't be saved.
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    return plain.eval()


def trained(base: nn.Module, **options: Any) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.2
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(8).reshape(1, 8)).logits


def merged_in_gguf(base: dict[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """llama.cpp's own rule: W + (alpha / r) · B A, on the stored tensors; the vocabulary's A and B swap."""
    reader = gguf.GGUFReader(adapter)
    alpha = float(reader.get_field("adapter.lora.alpha").contents())
    halves = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    out = dict(base)
    for name in [name.removesuffix(".lora_a") for name in halves if name.endswith(".lora_a")]:
        a, b = halves[f"{name}.lora_a"], halves[f"{name}.lora_b"]
        rank = b.shape[1]
        delta = a @ b.T if name.startswith("token_embd") else b @ a
        out[name] = base[name] + (alpha / rank if alpha else 1.0) * delta
    return out


@pytest.mark.parametrize("model_type", TARGETS)
def test_merged_in_gguf_and_merged_by_peft_are_one_model(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, arch = config_for(model_type), model_type
    start = AutoModelForCausalLM.from_config(config)
    stored = {name: torch.randn_like(t) * 0.1 for name, t in base_in_gguf(start, arch).items()}
    base = as_transformers_loads(stored, arch, config, tmp_path / "before")
    more = {"fan_in_fan_out": True} if model_type == "gpt2" else {}
    model = trained(base, target_modules=TARGETS[model_type], r=4, lora_alpha=6, rank_pattern={"o_proj": 2}, **more)
    model.save_pretrained(tmp_path / "lora")
    folder = tmp_path / "base"
    base.save_pretrained(folder)

    convert_adapter(tmp_path / "lora", tmp_path / "lora.gguf", "gguf-lora", base=folder)
    merged = as_transformers_loads(merged_in_gguf(stored, tmp_path / "lora.gguf"), arch, config, tmp_path / "after")

    by_peft = copy.deepcopy(model).merge_and_unload().state_dict()
    for name, value in merged.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        assert torch.allclose(by_peft[name], value, atol=1e-5), name
    assert not torch.allclose(logits(base), logits(merged), atol=1e-2)

    # And back: PEFT runs the folder made from the GGUF file as it ran its own.
    convert_adapter(tmp_path / "lora.gguf", tmp_path / "again", "peft", base=folder)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("again", "lora"))
    pairs = {key: value for key, value in theirs.items() if "base_layer" not in key}
    assert set(ours) == set(pairs)
    assert all(torch.equal(ours[key], value) for key, value in pairs.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gguf_file_comes_back_pair_for_pair_and_tensor_for_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"blk.{i}.attn_{role}.weight.lora_{half}": torch.randn(shape).to(dtype)
               for i in (0, 1) for role in "qk" for half, shape in (("a", (3, 16)), ("b", (8, 3)))}  # fmt: skip
    tensors["output_norm.weight"] = torch.randn(16)
    fields = {
        "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0, "general.file_type": 1,
        "general.name": "Made up", "general.quantization_version": 2, "adapter.alora.invocation_tokens": [5, 7],
    }  # fmt: skip
    write_gguf(tmp_path / "a.gguf", "llama", fields, tensors)
    adapter = load_adapter(tmp_path / "a.gguf")
    assert (adapter.format, adapter.unrecognised) == ("gguf-lora", ())
    # Without the base the heads are not known: the values stay shut, the file still comes back.
    adapter.save(tmp_path / "b.gguf")
    before, after = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "b.gguf")
    assert {t.name: (t.tensor_type, t.data.tobytes()) for t in after.tensors} == {
        t.name: (t.tensor_type, t.data.tobytes()) for t in before.tensors
    }
    contents = [
        {name: (field.types, field.contents()) for name, field in reader.fields.items() if "count" not in name}
        for reader in (before, after)
    ]
    assert contents[0] == contents[1]


def test_mistral_counts_as_llama(tmp_path: Path) -> None:
    config = {"model_type": "mistral", "num_attention_heads": 2, "num_key_value_heads": 1}
    update = {ModuleRef(MODEL, "model.layers.0.mlp.up_proj"): low_rank(1.0)}
    Adapter(update, "regraft", base_config=config).save(tmp_path / "a.gguf", format="gguf-lora")
    assert gguf.GGUFReader(tmp_path / "a.gguf").get_field("general.architecture").contents() == "llama"


def test_reordered_rows_without_heads_are_not_guessed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", {"general.type": "adapter"}, pair("blk.0.attn_q"))
    assert inspect_adapter(tmp_path / "a.gguf").components[MODEL].modules == 1
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.weight\.lora_b: .*heads.*--base"):
        convert_adapter(tmp_path / "a.gguf", tmp_path / "out", "peft")
    adapter = load_adapter(tmp_path / "a.gguf", base_config={"num_attention_heads": 3})
    with pytest.raises(InputError, match="heads"):
        adapter.updates[ModuleRef(MODEL, "model.layers.0.self_attn.q_proj")].up.load()


def pair(module: str, *, out: int = 8, rank: int = 2, width: int = 16) -> dict[str, Tensor]:
    return {f"{module}.weight.lora_a": torch.randn(rank, width), f"{module}.weight.lora_b": torch.randn(out, rank)}


def low_rank(scale: float, rank: int = 2, **more: Any) -> LowRank:
    return LowRank(InMemory(torch.randn(8, rank)), InMemory(torch.randn(rank, 16)), scale, **more)


def qwen2(**updates: Any) -> Adapter:
    named = {ModuleRef(MODEL, f"model.layers.0.{path.replace('__', '.')}"): u for path, u in updates.items()}
    return Adapter(named, "regraft", base_config={"model_type": "qwen2"})


def test_scales_that_one_alpha_can_not_give_are_multiplied_into_b_and_said(tmp_path: Path) -> None:
    from regraft.formats.gguf_lora import FORMAT

    adapter = qwen2(mlp__up_proj=low_rank(2.0), mlp__gate_proj=low_rank(2.0), self_attn__v_proj=low_rank(0.5, 3))
    adapter.save(tmp_path / "a.gguf", format="gguf-lora")
    assert float(gguf.GGUFReader(tmp_path / "a.gguf").get_field("adapter.lora.alpha").contents()) == 4.0
    again = load_adapter(tmp_path / "a.gguf")
    for module, update in adapter.updates.items():
        assert torch.allclose(again.updates[module].delta(), update.delta(), atol=1e-6)
    assert FORMAT.write is not None
    assert "1 modules' own scales" in FORMAT.write(adapter).notes[0]


def test_unit_scales_of_several_ranks_need_no_change(tmp_path: Path) -> None:
    adapter = qwen2(mlp__up_proj=low_rank(1.0), self_attn__v_proj=low_rank(1.0, 3))
    adapter.save(tmp_path / "a.gguf", format="gguf-lora")
    for module, update in load_adapter(tmp_path / "a.gguf").updates.items():
        assert update.scale == 1.0
        assert torch.equal(update.up.load(), adapter.updates[module].up.load())


def test_quantised_factors_are_read(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    values = torch.randn(4, 64)
    data = gguf.quants.quantize(values.numpy(), kind)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "qwen2")
    writer.add_string("general.type", "adapter")
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", data, raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_up.weight.lora_b", torch.randn(8, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (update,) = load_adapter(tmp_path / "q.gguf").updates.values()
    assert torch.equal(update.down.load(), torch.from_numpy(gguf.quants.dequantize(data, kind)))


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        (qwen2(mlp__up_proj=low_rank(1.0, magnitude=InMemory(torch.ones(8)))), "DoRA"),
        (qwen2(mlp__up_proj=low_rank(1.0, bias=InMemory(torch.ones(8)))), "bias of the factor B"),
        (qwen2(mlp__odd=low_rank(1.0)), "this module of qwen2"),
        (qwen2(input_layernorm__weight=Full(InMemory(torch.ones(8)), "x")), "stored whole"),
        (qwen2(mlp__up_proj=low_rank(1.0).cast(torch.float64)), "float64"),
        (Adapter({ModuleRef("unet", "conv_in"): low_rank(1.0)}, "regraft", base_config={"model_type": "t5"}), "unet"),
        (Adapter({ModuleRef(MODEL, "a"): low_rank(1.0)}, "regraft", base_config={"model_type": "rwkv"}), "rwkv"),
        (Adapter({ModuleRef(MODEL, "a"): low_rank(1.0)}, "regraft"), "architecture.*--base"),
    ],
)
def test_what_it_can_not_hold_is_refused(adapter: Adapter, says: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=says):
        adapter.save(tmp_path / "out.gguf", format="gguf-lora")
    assert list(tmp_path.iterdir()) == []


def test_the_suffix_must_be_true(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"suffix \.gguf"):
        qwen2(mlp__up_proj=low_rank(1.0)).save(tmp_path / "a.safetensors", format="gguf-lora")
    with pytest.raises(OutputError, match=r"suffix \.safetensors"):
        Adapter({ModuleRef("unet", "conv_in"): low_rank(1.0)}, "regraft").save(tmp_path / "a.gguf", format="kohya")


@pytest.mark.parametrize(
    ("fields", "tensors", "says"),
    [
        ({"adapter.type": "control"}, pair("blk.0.ffn_up"), "type 'control'"),
        ({"adapter.lora.alpha": float("nan")}, pair("blk.0.ffn_up"), "nan"),
        ({"adapter.lora.alpha": "6"}, pair("blk.0.ffn_up"), "'6'"),
        ({}, {"blk.0.ffn_up.weight.lora_a": torch.ones(2, 4)}, "no matching up"),
        ({}, pair("blk.0.ffn_up", rank=2) | {"blk.0.ffn_up.weight.lora_b": torch.ones(8, 3)}, "rank mismatch"),
    ],
)
def test_a_broken_file_is_named(fields: dict[str, Any], tensors: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "bad.gguf", "qwen2", {"general.type": "adapter"} | fields, tensors)
    with pytest.raises(InputError, match=rf"bad\.gguf.*{says}"):
        load_adapter(tmp_path / "bad.gguf")


def test_unknown_tensors_are_listed(tmp_path: Path) -> None:
    tensors = pair("blk.0.ffn_up") | {"odd.weight": torch.ones(2), "blk.0.ffn_up_exps.weight.lora_a": torch.ones(2, 2)}
    write_gguf(tmp_path / "a.gguf", "qwen2", {"general.type": "adapter"}, tensors)
    assert set(load_adapter(tmp_path / "a.gguf").unrecognised) == {"blk.0.ffn_up_exps.weight.lora_a", "odd.weight"}
    write_gguf(tmp_path / "b.gguf", "made-up", {"general.type": "adapter"}, tensors)
    assert set(load_adapter(tmp_path / "b.gguf").unrecognised) == set(tensors)


def test_experts_are_one_pair_there_and_a_pair_each_here(tmp_path: Path) -> None:
    stacked = {
        "blk.1.ffn_up_exps.weight.lora_a": torch.randn(3, 2, 16),
        "blk.1.ffn_up_exps.weight.lora_b": torch.randn(3, 8, 2),
    }
    write_gguf(tmp_path / "a.gguf", "qwen3moe", {"general.type": "adapter", "adapter.lora.alpha": 4.0}, stacked)
    adapter = load_adapter(tmp_path / "a.gguf")
    assert adapter.unrecognised == ()
    names = {f"model.layers.1.mlp.experts.{i}.up_proj" for i in range(3)}
    assert {module.path for module in adapter.updates} == names
    a, b = stacked.values()
    for i, update in enumerate(adapter.updates.values()):
        assert torch.allclose(update.delta(), 2 * b[i] @ a[i], atol=1e-6)

    convert_adapter(tmp_path / "a.gguf", tmp_path / "peft", "peft")
    base_config = {"model_type": "qwen3_moe", "num_experts": 3}
    back = load_adapter(tmp_path / "peft", base_config=base_config)
    for source in (adapter, back):
        source.save(tmp_path / "b.gguf", format="gguf-lora", overwrite=True)
        again = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
        assert set(again) == set(stacked)
        assert all(torch.equal(again[name], value) for name, value in stacked.items())
    for changes, says in (({"num_experts": 4}, "all 4 experts"), ({"num_experts": None}, "how many experts.*--base")):
        with pytest.raises(OutputError, match=says):
            replace(back, base_config=base_config | changes).save(tmp_path / "c.gguf", format="gguf-lora")


def test_the_tokens_that_invoke_an_alora_are_kept(tmp_path: Path) -> None:
    adapter = replace(qwen2(mlp__up_proj=low_rank(1.0)), config={"alora_invocation_tokens": [5, 7]})
    adapter.save(tmp_path / "a.gguf", format="gguf-lora")
    convert_adapter(tmp_path / "a.gguf", tmp_path / "peft", "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["alora_invocation_tokens"] == [5, 7]


def test_a_port_between_equal_bases_gives_the_same_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config_for("llama"))
    base.save_pretrained(tmp_path / "base")
    tensors = {
        f"blk.{i}.{module}.weight.lora_{half}": torch.randn(shape)
        for i in (0, 1)
        for module, out, width in (("attn_q", 32, 32), ("attn_k", 16, 32), ("ffn_down", 32, 48))
        for half, shape in (("a", (2, width)), ("b", (out, 2)))
    }
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    write_gguf(tmp_path / "in.gguf", "llama", fields, tensors)
    opened = open_base(tmp_path / "base")
    adapter = load_adapter(tmp_path / "in.gguf", base_config=opened.configs[MODEL])
    port(adapter, opened, opened, "copy").save(tmp_path / "out.gguf")
    after = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert set(after) == set(tensors)
    assert all(torch.equal(after[name], value) for name, value in tensors.items())
    assert len(ports_of(load_adapter(tmp_path / "out.gguf"))) == 1


def test_a_converted_file_carries_its_heads_for_the_way_back(tmp_path: Path) -> None:
    adapter = Adapter(
        {ModuleRef(MODEL, "model.layers.0.self_attn.q_proj"): low_rank(2.0)},
        "regraft",
        base_config={"model_type": "llama", "num_attention_heads": 2},
    )
    adapter.save(tmp_path / "a.gguf", format="gguf-lora")
    (update,) = load_adapter(tmp_path / "a.gguf").updates.values()
    assert torch.equal(update.up.load(), next(iter(adapter.updates.values())).up.load())
    convert_adapter(tmp_path / "a.gguf", tmp_path / "peft", "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_alpha"] == 4
