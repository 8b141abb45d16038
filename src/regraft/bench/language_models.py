"""The language models' bases: small Llamas of transformers' own class, and the ways in which one grows out of another.

Every way here is a pure function of a model to a model; training comes afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.bench.language_text import CHARACTERS
from regraft.runtime.libraries import library

#: Longest text that a model reads, in tokens.
CONTEXT = 128

# How unevenly the readers of a copied channel or unit share its weight; without it copies would stay alike for ever.
_UNEVEN = 0.5


@dataclass(frozen=True)
class Size:
    """Width, depth and the rest of a Llama."""

    width: int = 96
    layers: int = 6
    mlp: int = 256
    heads: int = 4
    vocabulary: int = len(CHARACTERS)


def new_model(size: Size, seed: int) -> Any:
    """A `LlamaForCausalLM` with random weights; its embeddings are not tied to its head."""
    llama = library("transformers")
    config = llama.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=2 * CONTEXT,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        architectures=["LlamaForCausalLM"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return llama.LlamaForCausalLM(config)


def pruned(model: Any, removed: Sequence[int]) -> Any:
    """``model`` without some blocks; the others keep their bytes and close ranks."""
    kept = [i for i in range(model.config.num_hidden_layers) if i not in set(removed)]
    return _with_blocks(model, kept)


def deepened(model: Any, copied: Sequence[int], *, identity: bool = False) -> Any:
    """``model`` with a copy of some blocks behind each of them.

    Args:
        model: a Llama.
        copied: numbers of the blocks that come twice.
        identity: zero what a copy writes to the residual stream (o_proj, down_proj), so that the function is kept
            (LLaMA Pro, Wu et al. 2024, §3.2); else a copy is a plain one (depth up-scaling, Kim et al. 2023: SOLAR
            copies one long range of blocks, we copy each block in its place).
    """
    order: list[int] = []
    zeroed: list[int] = []
    for i in range(model.config.num_hidden_layers):
        order.append(i)
        if i in set(copied):
            zeroed.append(len(order))
            order.append(i)
    deeper = _with_blocks(model, order)
    if identity:
        with torch.no_grad():
            for i in zeroed:
                deeper.model.layers[i].self_attn.o_proj.weight.zero_()
                deeper.model.layers[i].mlp.down_proj.weight.zero_()
    return deeper


def widened(model: Any, *, channels: int, heads: int, units: int, seed: int) -> Any:
    """``model`` with some residual channels, heads and MLP units copied; its function is kept.

    Net2Net (Chen, Goodfellow and Shlens 2016, eq. 1–3) for a Llama. Copied heads and units compute the same, and their
    readers share the old weight. A residual channel with k copies holds x/√k in each, so that the sum of squares under
    RMSNorm stays; the mean is over more channels, which its gain and ε make up for. The paper breaks the symmetry with
    noise; here the copies' readers share unevenly, by random parts that add up to the old weight, which is exact.

    Args:
        model: a Llama with as many key heads as heads.
        channels: how many residual channels to add.
        heads: how many heads to add.
        units: how many MLP units to add.
        seed: which ones are copied, and how unevenly their readers share.
    """
    generator = torch.Generator().manual_seed(seed)
    config = copy.deepcopy(model.config)
    size = config.head_dim
    hidden = _Copies(config.hidden_size, channels, generator)
    head = _Copies(config.num_attention_heads, heads, generator)
    mlp = _Copies(config.intermediate_size, units, generator)
    rows = head.spread(size)
    gain = (config.hidden_size / (config.hidden_size + channels)) ** 0.5
    config.rms_norm_eps *= config.hidden_size / (config.hidden_size + channels)
    config.hidden_size += channels
    config.intermediate_size += units
    config.num_attention_heads += heads
    config.num_key_value_heads += heads
    # Else a Llama would divide its new width by its new number of heads.
    config.head_dim = size

    def grown(name: str, old: Tensor) -> Tensor:
        stream = hidden.count.sqrt()
        if old.dim() == 1:
            return torch.as_tensor(old[hidden.source] * gain)
        if "embed_tokens" in name:
            return old[:, hidden.source] / stream
        # Readers of the stream: q, k, v, gate, up, head. Writers: o, down.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            read = (rows if "o_proj" in name else mlp).shared(old, generator)
            return read[hidden.source] / stream[:, None]
        read = hidden.shared(old, generator, stream)
        made = mlp if "mlp" in name else rows if "self_attn" in name else None
        return read if made is None else read[made.source]

    return _rebuilt(model, config, {name: grown(name, old) for name, old in model.state_dict().items()})


def with_tokens(model: Any, spelled: Sequence[Sequence[int]]) -> Any:
    """``model`` with another vocabulary: each new token's rows are the mean of those of the old ones that spell it.

    What vocabularies that change over trained blocks do as a start (the mean of sub-tokens; Gee et al. 2022, Fast
    Vocabulary Transfer). The head's rows are those of the first old token, which is what came next until now.

    Args:
        model: a Llama.
        spelled: for each new token, the old ids that spell it.
    """
    config = copy.deepcopy(model.config)
    config.vocab_size = len(spelled)
    state = dict(model.state_dict())
    embed, head = state["model.embed_tokens.weight"], state["lm_head.weight"]
    state["model.embed_tokens.weight"] = torch.stack([embed[list(ids)].mean(0) for ids in spelled])
    state["lm_head.weight"] = torch.stack([head[ids[0]] for ids in spelled])
    return _rebuilt(model, config, state)


class _Copies:
    """Which of ``n`` things come twice once ``more`` are added behind them."""

    def __init__(self, n: int, more: int, generator: torch.Generator) -> None:
        extra = torch.randperm(n, generator=generator)[:more]
        self.source = torch.cat([torch.arange(n), extra])
        self.count = torch.bincount(self.source, minlength=n)[self.source].float()

    def spread(self, size: int) -> _Copies:
        """The same for things of ``size`` rows each, such as heads."""
        wide = copy.copy(self)
        wide.source = (self.source[:, None] * size + torch.arange(size)).flatten()
        wide.count = self.count.repeat_interleave(size)
        return wide

    def shared(self, weight: Tensor, generator: torch.Generator, held: Tensor | None = None) -> Tensor:
        """A reader's weight (out, n) over the copies, (out, n + more): their shares sum to the old weight.

        Args:
            weight: the old one.
            generator: of the uneven part.
            held: what each copy is divided by; the reader makes up for it.
        """
        wide = weight[:, self.source] / self.count
        n = weight.shape[1]
        for new, old in enumerate(self.source[n:].tolist(), n):
            uneven = wide[:, old] * _UNEVEN * torch.randn(len(weight), generator=generator)
            wide[:, old] += uneven
            wide[:, new] -= uneven
        return wide if held is None else wide * held


def _with_blocks(model: Any, order: Sequence[int]) -> Any:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in order]
    old = model.state_dict()
    state = {name: value for name, value in old.items() if ".layers." not in name}
    for new, source in enumerate(order):
        start = f"model.layers.{source}."
        state |= {
            f"model.layers.{new}.{name.removeprefix(start)}": value
            for name, value in old.items()
            if name.startswith(start)
        }
    return _rebuilt(model, config, state)


def _rebuilt(model: Any, config: Any, state: Mapping[str, Tensor]) -> Any:
    with torch.random.fork_rng():
        made = type(model)(config)
    made.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    return made.train(model.training)
