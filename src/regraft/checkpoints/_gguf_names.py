"""Names and layouts of language models in GGUF, and how llama.cpp's converter changes weights on the way there.

Checked against llama.cpp's conversion/*.py (b7000 and later), gguf 0.19's name map, and transformers 5.23's reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from regraft.checkpoints._views import Reordered, Reshaped, RowRanges, Shifted
from regraft.tensors import TensorRef, Transposed

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_MIXTRAL = _LLAMA | {
    "blk.{}.ffn_gate_inp": "model.layers.{}.block_sparse_moe.gate",
    "blk.{}.ffn_gate_exps": "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "blk.{}.ffn_down_exps": "model.layers.{}.block_sparse_moe.experts.{}.w2",
    "blk.{}.ffn_up_exps": "model.layers.{}.block_sparse_moe.experts.{}.w3",
}
_QWEN_MOE = _LLAMA | {
    "blk.{}.ffn_gate_inp": "model.layers.{}.mlp.gate",
    "blk.{}.ffn_gate_exps": "model.layers.{}.mlp.experts.{}.gate_proj",
    "blk.{}.ffn_down_exps": "model.layers.{}.mlp.experts.{}.down_proj",
    "blk.{}.ffn_up_exps": "model.layers.{}.mlp.experts.{}.up_proj",
    "blk.{}.ffn_gate_inp_shexp": "model.layers.{}.mlp.shared_expert_gate",
    "blk.{}.ffn_gate_shexp": "model.layers.{}.mlp.shared_expert.gate_proj",
    "blk.{}.ffn_down_shexp": "model.layers.{}.mlp.shared_expert.down_proj",
    "blk.{}.ffn_up_shexp": "model.layers.{}.mlp.shared_expert.up_proj",
}
_POST_NORMS = {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GEMMA2 = _LLAMA | _POST_NORMS | {"blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm"}
_OLMO2 = {k: v for k, v in _LLAMA.items() if k not in ("blk.{}.attn_norm", "blk.{}.ffn_norm")} | _POST_NORMS
_PHI2 = _LLAMA | {
    "output_norm": "model.final_layernorm",
    "blk.{}.attn_output": "model.layers.{}.self_attn.dense",
    "blk.{}.ffn_up": "model.layers.{}.mlp.fc1",
    "blk.{}.ffn_down": "model.layers.{}.mlp.fc2",
}
_PHI3 = _LLAMA | {
    "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj",
}
_STARCODER2 = _LLAMA | {
    "blk.{}.ffn_up": "model.layers.{}.mlp.c_fc",
    "blk.{}.ffn_down": "model.layers.{}.mlp.c_proj",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{}.attn_norm": "transformer.h.{}.ln_1",
    "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
    "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
    "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
    "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
    "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
}
_GPT_NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "blk.{}.attn_norm": "gpt_neox.layers.{}.input_layernorm",
    "blk.{}.attn_qkv": "gpt_neox.layers.{}.attention.query_key_value",
    "blk.{}.attn_output": "gpt_neox.layers.{}.attention.dense",
    "blk.{}.ffn_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "blk.{}.ffn_down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}
_BLOOM = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{}.attn_norm": "transformer.h.{}.input_layernorm",
    "blk.{}.attn_qkv": "transformer.h.{}.self_attention.query_key_value",
    "blk.{}.attn_output": "transformer.h.{}.self_attention.dense",
    "blk.{}.ffn_norm": "transformer.h.{}.post_attention_layernorm",
    "blk.{}.ffn_up": "transformer.h.{}.mlp.dense_h_to_4h",
    "blk.{}.ffn_down": "transformer.h.{}.mlp.dense_4h_to_h",
}
_BERT = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "blk.{}.attn_q": "encoder.layer.{}.attention.self.query",
    "blk.{}.attn_k": "encoder.layer.{}.attention.self.key",
    "blk.{}.attn_v": "encoder.layer.{}.attention.self.value",
    "blk.{}.attn_output": "encoder.layer.{}.attention.output.dense",
    "blk.{}.attn_output_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "blk.{}.ffn_up": "encoder.layer.{}.intermediate.dense",
    "blk.{}.ffn_down": "encoder.layer.{}.output.dense",
    "blk.{}.layer_output_norm": "encoder.layer.{}.output.LayerNorm",
}


def _t5_attention(side: str, block: str, gguf: str, layer: int, kind: str) -> dict[str, str]:
    roles = {"q": "q", "k": "k", "v": "v", "o": "o", "rel_b": "relative_attention_bias"}
    names = {f"{side}.blk.{{}}.{gguf}_{a}": f"{block}.layer.{layer}.{kind}.{b}" for a, b in roles.items()}
    return names | {f"{side}.blk.{{}}.{gguf}_norm": f"{block}.layer.{layer}.layer_norm"}


def _t5_feed_forward(side: str, block: str, layer: int) -> dict[str, str]:
    dense = f"{block}.layer.{layer}.DenseReluDense"
    return {
        f"{side}.blk.{{}}.ffn_norm": f"{block}.layer.{layer}.layer_norm",
        f"{side}.blk.{{}}.ffn_gate": f"{dense}.wi_0",
        f"{side}.blk.{{}}.ffn_up": f"{dense}.wi_1",
        f"{side}.blk.{{}}.ffn_down": f"{dense}.wo",
    }


_T5 = {
    "token_embd": "shared",
    "output": "lm_head",
    "enc.output_norm": "encoder.final_layer_norm",
    "dec.output_norm": "decoder.final_layer_norm",
    **_t5_attention("enc", "encoder.block.{}", "attn", 0, "SelfAttention"),
    **_t5_feed_forward("enc", "encoder.block.{}", 1),
    **_t5_attention("dec", "decoder.block.{}", "attn", 0, "SelfAttention"),
    **_t5_attention("dec", "decoder.block.{}", "cross_attn", 1, "EncDecAttention"),
    **_t5_feed_forward("dec", "decoder.block.{}", 2),
}


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        names: llama.cpp's module name → transformers'; ``{}`` is the number of a block, a second one that of an expert.
        model_type: as transformers' ``config.json`` has it.
        interleaved: query and key rows are stored with the two halves of each head interleaved (Llama's rotary).
        norm_plus_one: norms are stored with 1 added.
        transposed: module names whose weights are stored transposed (GPT-2's Conv1D).
        grouped: the fused query-key-value, which transformers keeps head by head, is stored q, then k, then v.
    """

    names: Mapping[str, str]
    model_type: str
    interleaved: bool = False
    norm_plus_one: bool = False
    transposed: tuple[str, ...] = ()
    grouped: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_MIXTRAL, "llama", interleaved=True),
    "granite": Architecture(_LLAMA, "granite", interleaved=True),
    "smollm3": Architecture(_LLAMA, "smollm3", interleaved=True),
    "qwen2": Architecture(_LLAMA, "qwen2"),
    "qwen3": Architecture(_LLAMA, "qwen3"),
    "qwen2moe": Architecture(_QWEN_MOE, "qwen2_moe"),
    "qwen3moe": Architecture(_QWEN_MOE, "qwen3_moe"),
    "gemma": Architecture(_LLAMA, "gemma", norm_plus_one=True),
    "gemma2": Architecture(_GEMMA2, "gemma2", norm_plus_one=True),
    "gemma3": Architecture(_GEMMA2, "gemma3_text", norm_plus_one=True),
    "olmo2": Architecture(_OLMO2, "olmo2"),
    "command-r": Architecture(_LLAMA, "cohere"),
    "stablelm": Architecture(_LLAMA, "stablelm"),
    "phi2": Architecture(_PHI2, "phi"),
    "phi3": Architecture(_PHI3, "phi3"),
    "starcoder2": Architecture(_STARCODER2, "starcoder2"),
    "gpt2": Architecture(
        _GPT2, "gpt2", transposed=("blk.{}.attn_qkv", "blk.{}.attn_output", "blk.{}.ffn_up", "blk.{}.ffn_down")
    ),
    "gptneox": Architecture(_GPT_NEOX, "gpt_neox", grouped=True),
    "bloom": Architecture(_BLOOM, "bloom", grouped=True),
    "bert": Architecture(_BERT, "bert"),
    "t5": Architecture(_T5, "t5"),
    "t5encoder": Architecture(_T5, "t5"),
}


def _halves(rows: Tensor, head: int) -> Tensor:
    """Row of transformers' query (halves of a head one after the other) → row where the halves are interleaved."""
    within = rows % head
    return rows - within + 2 * (within % (head // 2)) + within // (head // 2)


def _by_role(rows: Tensor, head: int, heads: int) -> Tensor:
    """Row of a query-key-value kept head by head, (heads, 3, head) → row of (3, heads, head)."""
    role = rows // head % 3
    return role * heads * head + rows // (3 * head) * head + rows % head


def _heads(fields: Mapping[str, Any], arch: str, block: int, *, kv: bool) -> int | None:
    """Number of heads of a block, from the file's key-value pairs."""
    for key in (f"{arch}.attention.head_count_kv", f"{arch}.attention.head_count")[0 if kv else 1 :]:
        count = fields.get(key)
        if isinstance(count, list):
            count = count[block] if block < len(count) else None
        if isinstance(count, int) and count > 0:
            return count
    return None


@dataclass
class _Namer:
    arch: str
    known: Architecture
    fields: Mapping[str, Any]
    shown: dict[str, TensorRef] = field(default_factory=dict)

    def add(self, stored: str, ref: TensorRef) -> None:
        module, _, kind = stored.rpartition(".")
        number = re.search(r"\bblk\.(\d+)\.", module)
        pattern = module.replace(f".{number[1]}.", ".{}.", 1) if number else module
        name = self.known.names.get(pattern)
        if name is None:
            self.shown[stored] = ref
        elif name.count("{}") == 2:
            for i in range(ref.shape[0]):
                entry = Reshaped(RowRanges(ref, ((i, i + 1),)), ref.shape[1:])
                self.shown[f"{name.format(number[1] if number else 0, i)}.{kind}"] = entry
        else:
            restored = self._restored(pattern, kind, int(number[1]) if number else 0, ref)
            self.shown[f"{name.format(number[1]) if number else name}.{kind}"] = restored

    def _restored(self, pattern: str, kind: str, block: int, ref: TensorRef) -> TensorRef:
        """The tensor as transformers has it: what llama.cpp's converter did is undone."""
        rows = ref.shape[0] if ref.shape else 0
        role = pattern.rpartition(".")[2]
        if self.known.interleaved and role in ("attn_q", "attn_k"):
            heads = _heads(self.fields, self.arch, block, kv=role == "attn_k")
            if heads and rows % (2 * heads) == 0:
                return Reordered(ref, partial(_halves, head=rows // heads))
        if self.known.grouped and role == "attn_qkv":
            heads = _heads(self.fields, self.arch, block, kv=False)
            if heads and rows % (3 * heads) == 0:
                return Reordered(ref, partial(_by_role, head=rows // heads // 3, heads=heads))
        if self.known.norm_plus_one and pattern.endswith("norm") and kind == "weight":
            return Shifted(ref, -1.0)
        if pattern in self.known.transposed and kind == "weight":
            return Transposed(ref)
        if role == "ffn_gate_inp_shexp" and len(ref.shape) == 1:
            return Reshaped(ref, (1, rows))
        return ref


def transformers_names(
    tensors: Mapping[str, TensorRef], arch: str, fields: Mapping[str, Any]
) -> tuple[dict[str, TensorRef], tuple[str, ...]] | None:
    """A language model's tensors by transformers' names and layouts, and the names of those left out.

    None where the architecture isn't known. Rotary factors are no parameters in transformers: left out.
    """
    known = ARCHITECTURES.get(arch)
    if known is None:
        return None
    if known.names is _T5 and not any(".ffn_gate." in name for name in tensors):
        # The first T5 has one input matrix, where later ones have a gate beside it.
        names = {name: theirs.replace(".wi_1", ".wi") for name, theirs in _T5.items()}
        known = Architecture(names, known.model_type)
    left_out = tuple(name for name in tensors if name.startswith("rope_f"))
    namer = _Namer(arch, known, fields)
    for name, ref in tensors.items():
        if name not in left_out:
            namer.add(name, ref)
    return namer.shown, left_out
