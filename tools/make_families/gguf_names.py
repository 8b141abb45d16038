"""llama.cpp's names of language models' parameters, from the tables of its own ``gguf`` package.

Tiny models of the real classes are built on the meta device; each parameter is looked up as llama.cpp's converter does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

FILE = Path(__file__).parents[2] / "src" / "regraft" / "families" / "_gguf.json"

_TINY: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_GPT2: dict[str, Any] = {"vocab_size": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8}
_T5: dict[str, Any] = {"vocab_size": 16, "d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 2}

#: family → (llama.cpp's architecture, class, configuration)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", _TINY),
    "mistral": ("llama", "MistralForCausalLM", {**_TINY, "head_dim": 4}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _TINY),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _TINY),
    "gemma": ("gemma", "GemmaForCausalLM", _TINY),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", _TINY),
    "gemma3": ("gemma3", "Gemma3ForCausalLM", _TINY),
    "phi": ("phi2", "PhiForCausalLM", _TINY),
    "phi3": ("phi3", "Phi3ForCausalLM", {**_TINY, "pad_token_id": 0}),
    "gpt-neox": ("gptneox", "GPTNeoXForCausalLM", _TINY),
    "gpt2": ("gpt2", "GPT2LMHeadModel", _GPT2),
    "bert": ("bert", "BertModel", _TINY),
    "t5": ("t5", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
}

#: What llama.cpp's converter does with values, beside renaming (convert_hf_to_gguf.py): ``permuted`` rows of each head
#: alternate between the two halves (llama.cpp's rotary order); ``transposed``; ``plus_one`` is added to norms;
#: ``by_part`` has q, k, v stacked that are stored head by head in the canonical weight.
VALUES: dict[str, dict[str, list[str]]] = {
    "llama": {"permuted": ["attn_q", "attn_k"]},
    "mistral": {"permuted": ["attn_q", "attn_k"]},
    "gpt2": {"transposed": ["attn_qkv", "attn_output", "ffn_up", "ffn_down"]},
    "gpt-neox": {"by_part": ["attn_qkv"]},
    **{name: {"plus_one": ["norm"]} for name in ("gemma", "gemma2", "gemma3")},
}


def model(family: str) -> torch.nn.Module:
    """A tiny model of the family's class, on the meta device."""
    _, kind, config = MODELS[family]
    made = getattr(transformers, kind)
    with torch.device("meta"):
        return made(made.config_class(**config))


def names(family: str) -> dict[str, str]:
    """GGUF parameter → canonical parameter, ``{}`` for the block's number."""
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == MODELS[family][0])
    table = gguf.get_tensor_name_map(arch, 2)
    found: dict[str, str] = {}
    for name in model(family).state_dict():
        spelled = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if spelled is not None:
            found.setdefault(_template(spelled), _template(name))
    return found


def _template(name: str) -> str:
    return re.sub(r"(?<=\.)[01](?=\.)", "{}", name, count=1)


def main() -> None:
    content = {
        family: {"arch": MODELS[family][0], "values": VALUES.get(family, {}), "names": names(family)}
        for family in MODELS
    }
    lines = []
    for family, entry in content.items():
        rows = ",\n".join(f"   {json.dumps(old)}: {json.dumps(new)}" for old, new in entry["names"].items())
        head = f'  "arch": "{entry["arch"]}",\n  "values": {json.dumps(entry["values"])},\n'
        lines.append(f' "{family}": {{\n{head}  "names": {{\n{rows}\n  }}\n }}')
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
