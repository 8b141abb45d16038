"""GGUF language models: names, layouts and values, judged by transformers' own GGUF loading and by gguf's reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

gguf = pytest.importorskip("gguf")

from regraft import open_base  # noqa: E402
from regraft.adapter import MODEL  # noqa: E402
from regraft.checkpoints._gguf_file import read_gguf  # noqa: E402
from regraft.checkpoints._gguf_names import ARCHITECTURES, transformers_names  # noqa: E402
from regraft.checkpoints._views import leaves  # noqa: E402
from regraft.tensors import InMemory, read_rows  # noqa: E402

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q6_K", "Q4_K", "Q2_K", "IQ4_XS"]


def write(path: Path, arch: str, tensors: dict[str, Tensor], fields: dict[str, Any] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (fields or {}).items():
        name = key if "." in key and key.startswith(("general", "split", "comfy")) else f"{arch}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp's LlamaModel.permute stores a query or key."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


SIZES = {
    "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 8, "rope.freq_base": 10000.0, "vocab_size": 64,
}  # fmt: skip


def tiny(model_type: str) -> tuple[Any, dict[str, Any]]:
    """A random transformers model, and its sizes in llama.cpp's words."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    common |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = dict(SIZES)
    if model_type == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        sizes["attention.layer_norm_epsilon"] = 1e-5
        sizes["feed_forward_length"] = 128
    elif model_type == "gemma2":
        config = transformers.Gemma2Config(**common, head_dim=8)
        sizes |= {"attention.key_length": 8, "attention.sliding_window": 32}
    else:
        config = transformers.AutoConfig.for_model(model_type, **common)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model, sizes


def as_llama_cpp(arch: str, state: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """What llama.cpp's converter makes of a state dict, by its own name map."""
    name_map = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), 2)
    out = {}
    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue
        if arch == "llama" and "q_proj" in name:
            tensor = interleaved(tensor, 4)
        if arch == "llama" and "k_proj" in name:
            tensor = interleaved(tensor, 2)
        if arch == "gemma2" and name.endswith("norm.weight"):
            tensor = tensor + 1
        if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensor = tensor.T
        module, _, kind = name.rpartition(".")
        out[f"{name_map.get_name(module)}.{kind}"] = tensor
    return out


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_language_model_is_shown_as_transformers_loads_it(tmp_path: Path, arch: str) -> None:
    model, sizes = tiny(arch)
    tied = arch in ("gemma2", "gpt2")
    state = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    file = write(tmp_path / "m.gguf", arch, as_llama_cpp(arch, state, tied), sizes)
    base = open_base(file)
    shown = base.components[MODEL]
    assert {name: ref.shape for name, ref in shown.items()} == {n: tuple(t.shape) for n, t in state.items()}
    judge = type(model).from_pretrained(tmp_path, gguf_file="m.gguf", config=model.config).state_dict()
    for name, ref in shown.items():
        # Gemma's norms lose their last bit as 1 is added and taken off again.
        torch.testing.assert_close(ref.load(), judge[name], rtol=0, atol=1e-6 if arch == "gemma2" else 0)
        torch.testing.assert_close(ref.load(), state[name], rtol=0, atol=1e-6 if arch == "gemma2" else 0)
        rows = [range(3, 9), range(0, 2), range(20, 99)]
        assert torch.equal(read_rows(ref, rows), torch.cat([ref.load()[r.start : r.stop] for r in rows])), name
    assert base.configs[MODEL]["model_type"] == arch
    assert base.description == "gguf F32"


@pytest.mark.parametrize("arch", ["gptneox", "bloom"])
def test_a_fused_query_key_value_is_shown_head_by_head(tmp_path: Path, arch: str) -> None:
    heads, width = 4, 8
    whole = torch.randn(heads * 3 * width, 32)
    # As llama.cpp's GPTNeoXModel and BloomModel store it: all queries, all keys, all values.
    by_role = whole.reshape(heads, 3, width, 32).transpose(0, 1).reshape(whole.shape)
    file = write(tmp_path / "m.gguf", arch, {"blk.1.attn_qkv.weight": by_role}, {"attention.head_count": heads})
    (ref,) = open_base(file).components[MODEL].values()
    assert torch.equal(ref.load(), whole)
    assert torch.equal(read_rows(ref, [range(7, 50)]), whole[7:50])


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "d_model": 32,
    "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu", "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 16, "mlp_only_layers": [], "attention_bias": True, "use_qkv_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_parameter_of_transformers_model_gets_its_own_name_back(arch: str) -> None:
    transformers = pytest.importorskip("transformers")
    model_type = ARCHITECTURES[arch].model_type
    config = transformers.AutoConfig.for_model(model_type, **SMALL)
    kind = {"bert": "BertModel", "t5": "T5ForConditionalGeneration", "t5encoder": "T5EncoderModel"}.get(arch)
    with torch.device("meta"):
        causal = transformers.AutoModelForCausalLM
        model = getattr(transformers, kind)(config) if kind else causal.from_config(config)
    name_map = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), 2)
    stored, unknown = {}, []
    for name, tensor in model.named_parameters():
        module, _, suffix = name.rpartition(".")
        # llama.cpp's names of Bloom start from BloomModel's.
        theirs = name_map.get_name(module) or name_map.get_name(module.removeprefix("transformer."))
        if theirs is None:
            unknown.append(name)
        else:
            stored[f"{theirs}.{suffix}"] = (name, tensor)
    # The pooler and the experts of transformers 5, which are one tensor, have no counterpart.
    assert all("pooler" in name or ".experts." in name for name in unknown), unknown
    assert len(stored) > 9
    found = transformers_names({key: InMemory(tensor) for key, (_, tensor) in stored.items()}, arch, {})
    assert found is not None
    # In GPT-NeoX's files the head has its old name; transformers 5 maps it while loading.
    assert {name.replace("embed_out", "lm_head") for name in found[0]} == {name for name, _ in stored.values()}


def test_experts_are_shown_one_by_one_and_rotary_factors_are_left_out(tmp_path: Path) -> None:
    experts = torch.randn(3, 8, 16)
    tensors = {"blk.0.ffn_up_exps.weight": experts, "rope_freqs.weight": torch.ones(4), "blk.0.odd.weight": experts[0]}
    base = open_base(write(tmp_path / "m.gguf", "llama", tensors))
    shown = base.components[MODEL]
    names = {f"model.layers.0.block_sparse_moe.experts.{i}.w3.weight" for i in range(3)}
    assert set(shown) == names | {"blk.0.odd.weight"}
    assert torch.equal(shown["model.layers.0.block_sparse_moe.experts.1.w3.weight"].load(), experts[1])
    assert base.left_out == ("rope_freqs.weight",)
    assert {leaf.name for ref in shown.values() for leaf in leaves(ref)} | set(base.left_out) == set(tensors)


def stored(path: Path, kind: str, shape: tuple[int, ...]) -> Path:
    """One tensor of a type, its bytes random where gguf can't quantise to it."""
    qtype = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    writer = gguf.GGUFWriter(path, "made-up")
    try:
        data = gguf.quants.quantize(values, qtype)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[qtype]
        # Small bytes: as half precision scales they are neither NaN nor Inf.
        data = np.random.default_rng(0).integers(0, 60, (*shape[:-1], shape[-1] // block * size)).astype(np.uint8)
    writer.add_tensor("x.weight", data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_ggufs_own_reader(tmp_path: Path, kind: str) -> None:
    file = stored(tmp_path / "x.gguf", kind, (5, 3, 512))
    (judge,) = gguf.GGUFReader(file).tensors
    wanted = torch.from_numpy(np.array(gguf.quants.dequantize(judge.data, judge.tensor_type))).reshape(5, 3, 512)
    base = open_base(file)
    ref = base.components[MODEL]["x.weight"]
    assert ref.shape == (5, 3, 512)
    assert ref.load().dtype == ref.dtype
    assert torch.equal(ref.load().float(), wanted)
    assert torch.equal(read_rows(ref, [range(1, 3), range(4, 9)]).float(), torch.cat([wanted[1:3], wanted[4:]]))
    assert base.description == f"gguf {kind}, names as stored (architecture 'made-up')"
    assert read_gguf(file).fields["general.architecture"] == "made-up"


def test_a_split_model_is_one_model_and_a_missing_part_is_named(tmp_path: Path) -> None:
    for i in (1, 2):
        write(tmp_path / f"m-{i:05}-of-00002.gguf", "qwen2", {f"blk.{i}.attn_q.weight": torch.ones(4, 4)})
    shown = open_base(tmp_path / "m-00001-of-00002.gguf").components[MODEL]
    assert set(shown) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (1, 2)}
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(Exception, match=r"m-00002-of-00002\.gguf: a part of the split model is missing"):
        open_base(tmp_path / "m-00001-of-00002.gguf")
