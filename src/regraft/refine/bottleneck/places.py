"""Where bottlenecks sit in a model, and what their keys are called there: facts about the `adapters` library.

https://github.com/adapter-hub/adapters (Apache-2.0): ``src/adapters/models/*/mixin_*.py`` and ``modeling_*.py``, and
for models by its plug-in interface ``src/adapters/wrappers/interfaces.py``. What is read here was held against
version 1.3.0 itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from regraft.errors import InputError
from regraft.runtime.load import Loaded

#: Behind a block's attention, or behind its feed-forward; by the library's options of these names.
Position = Literal["mh_adapter", "output_adapter"]


class Spot(NamedTuple):
    """One bottleneck's place: a block, counted from 0, and a position in it."""

    block: int
    position: Position


@dataclass(frozen=True)
class Place:
    """A position in a block.

    Attributes:
        key: what the library calls it, behind the block's name.
        sublayer: whose output it reads.
        norm: where the residual connection is met. In a block that normalises at the end, the LayerNorm of the sum; in
            one that normalises at the beginning, the norm whose input is the residual.
    """

    key: str
    sublayer: str
    norm: str


@dataclass(frozen=True)
class Layout:
    """A kind of blocks.

    Attributes:
        blocks: their list in the model without its head.
        norm_last: whether they normalise at the end, behind the residual connection.
        places: position → place.
    """

    blocks: str
    norm_last: bool
    places: Mapping[Position, Place]


_BERT = Layout(
    "encoder.layer",
    True,
    {
        "mh_adapter": Place("attention.output", "attention.output.dropout", "attention.output.LayerNorm"),
        "output_adapter": Place("output", "output.dropout", "output.LayerNorm"),
    },
)
_DISTILBERT = Layout(
    "transformer.layer",
    True,
    {
        "mh_adapter": Place("attention_adapters", "attention", "sa_layer_norm"),
        "output_adapter": Place("output_adapters", "ffn", "output_layer_norm"),
    },
)
_LLAMA = Layout(
    "layers",
    False,
    {
        "mh_adapter": Place("attention_adapters", "self_attn", "input_layernorm"),
        "output_adapter": Place("output_adapters", "mlp", "post_attention_layernorm"),
    },
)
_GPT2 = Layout(
    "h",
    False,
    {
        "mh_adapter": Place("attention_adapters", "attn", "ln_1"),
        "output_adapter": Place("output_adapters", "mlp", "ln_2"),
    },
)
#: transformers' model type → its blocks.
LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    "distilbert": _DISTILBERT,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gpt2": _GPT2,
}


def layout_of(model: Loaded) -> Layout:
    """The layout of a loaded model.

    Raises:
        InputError: bottlenecks aren't placed in models of its type.
    """
    kind = str(getattr(getattr(model.main, "config", None), "model_type", None))
    if kind not in LAYOUTS:
        raise InputError(
            f"is a model of type {kind}: bottlenecks aren't placed in such ones",
            file=model.path,
            remedy=f"Those of {', '.join(LAYOUTS)} are.",
        )
    return LAYOUTS[kind]


def blocks_of(model: Loaded) -> list[nn.Module]:
    """The blocks of a loaded model of a known layout, in order."""
    return list(model.main.base_model.get_submodule(layout_of(model).blocks))


def width_of(model: Loaded) -> int:
    """Numbers of a hidden state."""
    return int(model.main.config.hidden_size)
