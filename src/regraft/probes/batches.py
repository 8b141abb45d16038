"""The same self-made inputs for two models, to learn from: fit and held-out parts, rows that answer to each other.

Where `regraft.probes.make_probe` gives few inputs to measure an effect by, these are many, in batches, and each knows
which model made it: the old base, the old base with its adapter, or the new base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from regraft.adapter import Adapter
from regraft.errors import InputError
from regraft.probes.batches_aligned import align
from regraft.probes.sentences import SENTENCES
from regraft.probes.text import encode, longest, same_tokens, sample_texts, sentence, vocabulary_of
from regraft.runtime.applied import applied
from regraft.runtime.both import BothModels, Side
from regraft.runtime.libraries import quiet_libraries
from regraft.runtime.load import Loaded

#: Who made an input: the old base, the old base with its adapter, the new base, or none of them.
Maker = Literal["old", "adapter", "new", "given"]

#: Makes a context inside of which a model has an adapter.
AtWork = Callable[[], AbstractContextManager[None]]

N_INPUTS, SAMPLED_TOKENS, TOGETHER = 192, 64, 32


class Batch(Protocol):
    """Inputs that are run together."""

    @property
    def made_by(self) -> Maker:
        """Which model made them."""
        ...

    def __len__(self) -> int: ...

    def run(self, model: Loaded, side: Side) -> Tensor:
        """The model's output: logits (n, positions, vocabulary), hidden states, or predictions (n, channels, …).

        Args:
            model: the base of that side, or a `regraft.runtime.both.twin` of it.
            side: which of the two bases it is.
        """
        ...

    def rows(self, side: Side) -> Tensor | None:
        """Rows of the main model's flattened (n · positions) activations that answer to those of the other side.

        None: all of them, in order.
        """
        ...

    def first(self) -> Batch:
        """Its first input alone, for what doesn't depend on how many there are."""
        ...


@dataclass(frozen=True)
class Batches:
    """Inputs to fit on, and others to choose by.

    Attributes:
        fit: from the old base and the old base with its adapter.
        held_out: likewise, and from the new base.
        made: how, in words.
    """

    fit: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    made: str

    def held(self, *makers: Maker) -> tuple[Batch, ...]:
        """Held-out batches that these made."""
        return tuple(batch for batch in self.held_out if batch.made_by in makers)


def make_batches(
    models: BothModels,
    adapter: Adapter | None,
    n: int | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    *,
    held_out: int | None = None,
    at_work: AtWork | None = None,
) -> Batches:
    """Inputs for both models.

    Args:
        models: both bases.
        adapter: for the old one: half of the inputs come from the old base with it. None: from the old and new bases.
        n: inputs to fit on; by default 192. A denoiser's inputs are noisy states, four of each picture.
        seed: same seed, same inputs.
        prompts: texts instead of made ones (a denoiser's prompts).
        held_out: further inputs to choose by; by default a quarter as many from each of the three makers.
        at_work: for language models, a context inside of which the old base has an adapter of another kind.

    Raises:
        InputError: there are no inputs that both can read, or prompts and no tokenizer.
    """
    n = n or N_INPUTS
    held_out = max(4, n // 4) if held_out is None else held_out
    with quiet_libraries():
        if models.old.kind == "denoiser":
            from regraft.probes.batches_diffusion import diffusion_batches

            return diffusion_batches(models, adapter, n, seed, prompts, held_out)
        if at_work is None and adapter is not None:
            at_work = partial(applied, models.old.components, adapter)
        return _text_batches(models, at_work, n, seed, prompts, held_out)


@dataclass(frozen=True)
class TextBatch:
    """Texts of one length.

    Attributes:
        ids: side → token ids (n, positions).
        made_by: by which model.
        kept: side → rows that answer to the other side's; None for all.
        language: whether outputs are logits.
    """

    ids: Mapping[Side, Tensor]
    made_by: Maker
    language: bool
    kept: Mapping[Side, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.ids["old"])

    @torch.no_grad()
    def run(self, model: Loaded, side: Side) -> Tensor:
        """Logits (n, positions, vocabulary), or last hidden states (n, positions, width)."""
        inputs = {"input_ids": self.ids[side].to(model.device)}
        if getattr(model.main.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"]
        if self.language:
            logits: Tensor = model.main(**inputs).logits
            return logits
        out = model.main(**inputs, output_hidden_states=True)
        hidden = getattr(out, "last_hidden_state", None)
        return out.hidden_states[-1] if hidden is None else hidden  # type: ignore[no-any-return]

    def rows(self, side: Side) -> Tensor | None:
        return None if self.kept is None else self.kept[side]

    def first(self) -> TextBatch:
        return replace(self, ids={side: ids[:1] for side, ids in self.ids.items()}, kept=None)


def _text_batches(
    models: BothModels, at_work: AtWork | None, n: int, seed: int, prompts: Sequence[str] | None, held_out: int
) -> Batches:
    old, new = models.old, models.new
    aligned = other_tokens(old, new)
    if aligned and not (writes(old) and writes(new)):
        raise InputError("splits text into other tokens than the old base, and does not read from left to right alone")
    if prompts is not None or not writes(old):
        return _given_texts(models, n, prompts, held_out, seed)
    generator = torch.Generator().manual_seed(seed)
    rows: dict[Maker, list[Tensor]] = {}
    second: Maker = "adapter" if at_work is not None else "new"
    with models.turn("old"):
        rows["old"] = sample_texts(old, n - n // 2 + held_out, generator, SAMPLED_TOKENS)
        if at_work is not None:
            with at_work():
                rows["adapter"] = sample_texts(old, n // 2 + held_out, generator, SAMPLED_TOKENS)
    with models.turn("new"):
        count = held_out if at_work is not None else n // 2 + held_out
        rows["new"] = sample_texts(new, count, generator, SAMPLED_TOKENS)
    cap = min(vocabulary_of(old), vocabulary_of(new)) if not aligned else max(vocabulary_of(old), vocabulary_of(new))
    fit: list[Batch] = []
    held: list[Batch] = []
    for maker, texts in rows.items():
        count = {"old": n - n // 2, second: n // 2}.get(maker, 0)
        if not texts:
            # Of no texts, a tokenizer decodes an empty one.
            continue
        texts = [text.clamp_max(cap - 1) for text in texts]
        if aligned:
            written = (new if maker == "new" else old).tokenizer.batch_decode([text[0] for text in texts])
            fit += aligned_batches(written[:count], maker, models)
            held += aligned_batches(written[count:], maker, models)
            continue
        fit += _together(texts[:count], maker, old, new)
        held += _together(texts[count:], maker, old, new)
    length = rows["old"][0].shape[1]
    halves = "the old base and the old base with its adapter" if at_work is not None else "the old and the new base"
    made = f"{n} texts of {length} tokens, sampled at temperature 1 from {halves}, half each, seed {seed}"
    return Batches(tuple(fit), tuple(held), made)


def writes(model: Loaded) -> bool:
    """Whether it is a language model that reads from left to right alone, so that texts can be drawn from it."""
    return model.kind == "language" and not getattr(model.main.config, "is_encoder_decoder", False)


def other_tokens(old: Loaded, new: Loaded) -> bool:
    """Whether the two models number or split text differently.

    Raises:
        InputError: they do, and have no tokenizers to tell how.
    """
    ours, theirs = old.tokenizer, new.tokenizer
    if ours is not None and theirs is not None:
        return not same_tokens(ours, theirs)
    if vocabulary_of(old) != vocabulary_of(new):
        sizes = f"{vocabulary_of(old)} and {vocabulary_of(new)}"
        raise InputError(
            f"the vocabularies differ ({sizes} tokens), and there are no tokenizers to tell how",
            file=new.path,
            remedy="Put both tokenizers' files beside the models, or take a method that runs no model.",
        )
    return False


def aligned_batches(texts: Sequence[str], maker: Maker, models: BothModels) -> list[Batch]:
    batches: list[Batch] = []
    for i in range(0, len(texts), TOGETHER):
        found = align(texts[i : i + TOGETHER], models)
        batches.append(TextBatch(found.ids, maker, True, found.rows))
    return batches


def _given_texts(models: BothModels, n: int, prompts: Sequence[str] | None, held_out: int, seed: int) -> Batches:
    old, new = models.old, models.new
    # Nobody's own writing: they stand for whatever the models will read.
    maker: Maker = "given"
    if old.tokenizer is None and prompts is not None:
        raise InputError(
            "there is no tokenizer to read the prompts with",
            file=old.path,
            remedy="Leave --prompts out, or put the tokenizer's files into the model's folder.",
        )
    if old.tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        size = (n + held_out, min(longest(old, SAMPLED_TOKENS), longest(new, SAMPLED_TOKENS)))
        ids = torch.randint(min(vocabulary_of(old), vocabulary_of(new)), size, generator=generator)
        texts = list(ids.unsqueeze(1))
        made = f"{n} sequences of {size[1]} random token ids (there is no tokenizer), seed {seed}"
    else:
        count = n + held_out
        given = list(prompts) if prompts is not None else [sentence(i) for i in range(max(count, len(SENTENCES)))]
        # Spread over the list, so that held-out ones are of the same kind.
        order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed)).tolist()
        given = [given[i] for i in order[:count]]
        if other_tokens(old, new):
            apart = min(held_out, max(1, len(given) // 5))
            to_fit, to_hold = (
                aligned_batches(given[apart:], maker, models),
                aligned_batches(given[:apart], maker, models),
            )
            return Batches(tuple(to_fit), tuple(to_hold), f"{len(given)} texts given, seed {seed}")
        texts = [encode(old, text) for text in given]
        texts = [text[:, : longest(new, text.shape[1])] for text in texts]
        made = f"{len(texts)} {'texts given' if prompts is not None else 'plain English sentences'}, seed {seed}"
    held = min(held_out, max(1, len(texts) // 5))
    if len(texts) < 2:
        raise InputError("one text alone is too few to fit and to choose by", remedy="Give more prompts.")
    cut = len(texts) - held
    fit, rest = (_together(part, maker, old, new) for part in (texts[:cut], texts[cut:]))
    return Batches(tuple(fit), tuple(rest), made)


def _together(texts: Sequence[Tensor], maker: Maker, old: Loaded, new: Loaded) -> list[Batch]:
    """Texts (1, positions) of one length side by side, so that nothing is padded."""
    by_length: dict[int, list[Tensor]] = {}
    for text in texts:
        by_length.setdefault(text.shape[1], []).append(text)
    batches: list[Batch] = []
    for alike in by_length.values():
        for i in range(0, len(alike), TOGETHER):
            ids = torch.cat(alike[i : i + TOGETHER])
            batches.append(TextBatch({"old": ids, "new": ids}, maker, old.kind == "language"))
    return batches
