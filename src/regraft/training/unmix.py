"""The unmix regulariser: a subject's special token is not to attend to the other subject's region.

Source: Han et al., ICCV 2023, arXiv 2303.11305, section 3.3: "MSE on the non-corresponding regions of the
cross-attention maps". The paper refers to an appendix for the rest, which could not be read; chosen here are:

- all cross-attention layers, each at its own resolution and of the same weight, as a mean over their heads;
- probabilities after the softmax, squared (an error against 0), as a mean over the other subject's region;
- masks averaged down to a map's resolution: a position on the border counts by its share;
- a special token of several pieces: the mean over the pieces;
- collages only: a plain sample has no other region;
- the weight beside the denoising loss is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from regraft.errors import InputError
from regraft.runtime.libraries import library
from regraft.training.cutmix import Sample

# These compute softmax(q kᵀ) v, if in different ways; others have more to them, which the recorder's would leave out.
_SAME = {"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"}


@contextmanager
def recorded_attention(denoiser: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the cross-attention probabilities of a diffusers denoiser while it runs, with their gradients.

    Its output stays the same, to float tolerance. PEFT's layers on the projections take part. Each run of the denoiser
    replaces what the last one left. With gradient checkpointing, go backward within the context: it runs again there.

    Args:
        denoiser: such as a ``UNet2DConditionModel``, with PEFT's wrapper or without: what has ``attn2`` modules.

    Yields:
        Name of the attention module → probabilities (n, heads, positions, tokens); they outlive the context.

    Raises:
        InputError: it has no cross-attention, or one with more to it than queries, keys and values, as IP-Adapter's.
    """
    found = _cross_attention(denoiser)
    maps: dict[str, Tensor] = {}
    before = {name: module.processor for name, module in found.items()}
    try:
        for name, module in found.items():
            module.set_processor(_Recorder(maps, name))
        yield maps
    finally:
        for name, module in found.items():
            module.set_processor(before[name])


def _cross_attention(denoiser: nn.Module) -> dict[str, Any]:
    attention = library("diffusers.models.attention_processor").Attention
    found: dict[str, Any] = {
        name: module
        for name, module in denoiser.named_modules()
        if name.rpartition(".")[2] == "attn2" and isinstance(module, attention) and module.is_cross_attention
    }
    if not found:
        raise InputError(
            f"a {type(denoiser).__name__} has no cross-attention that could be kept apart",
            remedy="Train without unmix; collages need none.",
        )
    for name, module in found.items():
        kind = type(module.processor).__name__
        if kind not in _SAME or getattr(module, "norm_q", None) is not None:
            raise InputError(f"its attention ({kind}) can't be recorded", key=name, remedy="Train without unmix.")
    return found


class _Recorder:
    """diffusers' plain attention processor, which computes the probabilities one by one, with an eye on them."""

    def __init__(self, maps: dict[str, Tensor], name: str) -> None:
        self._plain = library("diffusers.models.attention_processor").AttnProcessor()
        self._maps, self._name = maps, name

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        watched = _Watched(attn, self._keep)
        result: Tensor = self._plain(watched, hidden_states, encoder_hidden_states, attention_mask, temb)
        return result

    def _keep(self, probabilities: Tensor) -> None:
        self._maps[self._name] = probabilities


class _Watched:
    """An attention module in all but one thing: it shows its probabilities."""

    def __init__(self, attention: Any, keep: Any) -> None:
        self._attention, self._keep = attention, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self._attention.get_attention_scores(query, key, attention_mask)
        self._keep(found.reshape(-1, self._attention.heads, *found.shape[1:]))
        return found


@dataclass(frozen=True)
class Apart:
    """Of a batch, which tokens are to keep out of which regions.

    Attributes:
        tokens: (n, 2, tokens): for each subject of a collage, the mean over the pieces of its special token; zeros for
            what is no collage.
        others: (n, 2, h, w): the other subject's region, in [0, 1].
    """

    tokens: Tensor
    others: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample], tokenizer: Any, max_length: int | None = None) -> Apart:
        """Look up the special tokens in the samples' prompts.

        Args:
            samples: a batch, (h, w) alike; collages of subjects without an identifier, or without a prompt, count as
                none.
            tokenizer: of transformers, that of the text encoder.
            max_length: tokens that prompts are padded and cut to; None for the tokenizer's own.

        Raises:
            InputError: a special token is not in its prompt, is in it twice, or is cut off.
        """
        length = max_length or int(tokenizer.model_max_length)
        tokens = torch.zeros(len(samples), 2, length)
        others = torch.zeros(len(samples), 2, *samples[0].picture.shape[-2:])
        for at, sample in enumerate(samples):
            named = all(subject.identifier for subject in sample.subjects)
            if not (sample.is_collage and sample.prompt and named):
                continue
            for which, subject in enumerate(sample.subjects):
                places = token_positions(tokenizer, sample.prompt, subject.identifier, length)
                tokens[at, which, places] = 1 / len(places)
                others[at, which] = sample.regions[1 - which].float()
        return cls(tokens, others)


def token_positions(tokenizer: Any, prompt: str, identifier: str, max_length: int | None = None) -> list[int]:
    """Where the pieces of a special token stand in a prompt.

    Args:
        tokenizer: of transformers.
        prompt: with the special token in it.
        identifier: the special token, one word.
        max_length: tokens that the model reads; None for the tokenizer's own limit.

    Returns:
        Positions among the prompt's tokens, those that the tokenizer adds at the start counted.

    Raises:
        InputError: it is not in the prompt, is in it twice, or is cut off.
    """
    length = max_length or int(tokenizer.model_max_length)
    whole = list(tokenizer(prompt, truncation=False, verbose=False).input_ids)
    pieces = list(tokenizer(identifier, add_special_tokens=False).input_ids)
    starts = [at for at in range(len(whole)) if pieces and whole[at : at + len(pieces)] == pieces]
    if len(starts) != 1:
        how = "is not" if not starts else f"is {len(starts)} times"
        raise InputError(
            f"the special token {identifier!r} {how} in the tokens of the prompt {prompt!r}",
            remedy="Give each subject a word of its own that the tokenizer keeps as it is.",
        )
    places = list(range(starts[0], starts[0] + len(pieces)))
    # A cut prompt ends as a whole one does, with the tokens that the tokenizer adds.
    cut = list(tokenizer(prompt, truncation=True, max_length=length).input_ids)
    if [cut[at] for at in places if at < len(cut)] != pieces:
        what = f"the special token {identifier!r} is cut off: the prompt {prompt!r} has {len(whole)} tokens, and"
        raise InputError(f"{what} {length} are read", remedy="Give a shorter prompt.")
    return places


def unmix_loss(maps: Mapping[str, Tensor], apart: Apart, size: tuple[int, int]) -> Tensor:
    """Mean squared attention of each special token to the other subject's region.

    Args:
        maps: from `recorded_attention`, (n, heads, positions, tokens) each.
        apart: of the same n samples.
        size: (h, w) of the denoiser's input, which tells the shape of each map.

    Returns:
        A scalar, float32; 0 where no sample is a collage.

    Raises:
        InputError: a map's positions are no picture of that shape.
    """
    collages = int((apart.tokens.sum(-1) > 0).any(1).sum())
    parts = []
    for name, found in maps.items():
        others = functional.adaptive_avg_pool2d(apart.others, _shape(name, found.shape[2], size)).flatten(2)
        others = others / others.sum(-1, keepdim=True).clamp_min(1e-8)
        weights = (others.to(found.device), apart.tokens.to(found.device))
        part = torch.einsum("nhpt,nsp,nst->", found.float().square(), *weights)
        parts.append(part / (2 * max(1, collages) * found.shape[1]))
    return torch.stack(parts).mean()


def _shape(name: str, positions: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a map: the input's, halved until they fit."""
    height, width = size
    while height * width > positions:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != positions:
        what = f"its {positions} positions are no picture of the shape of {size[0]} × {size[1]}"
        raise InputError(what, key=name, remedy="Train without unmix.")
    return height, width
