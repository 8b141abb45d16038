"""Which way round a module's weight lies, as PEFT's files tell modules apart: by names and the base's own config."""

from __future__ import annotations

import re

from regraft.adapter import ModuleRef
from regraft.base import Base
from regraft.updates.lowrank import Orientation

#: Names of embeddings: these have the shape of a linear layer.
EMBEDDING = re.compile(
    r"(^|\.)(\w*embed_tokens|wte|wpe|embed_in|shared|relative_attention_bias|(\w+_)?embeddings?)$", re.IGNORECASE
)
# transformers' Conv1D stores its weight as (in, out).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "gpt_bigcode", "imagegpt")
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")


def orientation_in(base: Base, module: ModuleRef, dims: int) -> Orientation:
    """What a module of a base is.

    Args:
        base: any.
        module: by the base's names.
        dims: of its weight.
    """
    kind = str(base.configs.get(module.component, {}).get("model_type") or "")
    if dims == 2 and kind in _CONV1D_MODELS and _CONV1D.search(module.path):
        return "conv1d"
    return "embedding" if dims == 2 and EMBEDDING.search(module.path) else "weight"
