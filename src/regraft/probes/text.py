"""Inputs for models that read text: sampled from the old model itself, plain sentences, or the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regraft.adapter import Adapter
from regraft.errors import InputError
from regraft.probes.sentences import SENTENCES
from regraft.runtime.applied import applied
from regraft.runtime.load import Loaded

N_INPUTS, SAMPLED_TOKENS, RANDOM_TOKENS, MOST_TOKENS = 32, 64, 32, 256


@dataclass(frozen=True)
class TextProbe:
    """Token sequences, each run alone, so that nothing is padded.

    Attributes:
        rows: token ids, (1, positions) each.
        made: how, in words.
        prompts: the user's own texts.
        logits: whether outputs are logits.
        tokenizer: the one that the ids are of.
        vocabulary: logits beyond this many are cut off (rows of added or padding tokens).
    """

    rows: tuple[Tensor, ...]
    made: str
    prompts: list[str]
    logits: bool
    tokenizer: Any
    vocabulary: int

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def outputs(self, model: Loaded) -> Iterator[Tensor]:
        """Logits (positions, vocabulary) or last hidden states (positions, width) of each input."""
        for row in self.rows:
            inputs = {"input_ids": row.to(model.device)}
            if getattr(model.main.config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = inputs["input_ids"]
            if self.logits:
                yield model.main(**inputs).logits[0, :, : self.vocabulary].float().cpu()
            else:
                out = model.main(**inputs, output_hidden_states=True)
                hidden = getattr(out, "last_hidden_state", None)
                yield (out.hidden_states[-1] if hidden is None else hidden)[0].float().cpu()

    def carried_to(self, model: Loaded) -> tuple[TextProbe, str | None]:
        """The same ids where both models number their tokens alike, else the same texts in the new model's tokens."""
        vocabulary = vocabulary_of(model)
        shared = replace(self, rows=_cut(self.rows, model), vocabulary=min(self.vocabulary, vocabulary))
        if (model.kind == "language") is not self.logits:
            return shared, "one of the two is a language model and the other is not"
        if self.tokenizer is not None and model.tokenizer is not None:
            if same_tokens(self.tokenizer, model.tokenizer):
                return shared, None
            texts = self.prompts or self.tokenizer.batch_decode([row[0] for row in self.rows], skip_special_tokens=True)
            rows = tuple(encode(model, text or ".") for text in texts)
            again = replace(self, rows=rows, tokenizer=model.tokenizer, vocabulary=vocabulary)
            return again, "the two models split text into different tokens"
        if vocabulary != self.vocabulary:
            rows = tuple(row % vocabulary for row in shared.rows)
            return replace(shared, rows=rows), f"the vocabularies differ ({self.vocabulary} and {vocabulary} tokens)"
        return shared, None


def text_probe(
    model: Loaded, adapter: Adapter, *, prompts: Sequence[str] | None, n_inputs: int | None, seed: int
) -> TextProbe:
    """See `regraft.probes.make_probe`."""
    n, generator = n_inputs or N_INPUTS, torch.Generator().manual_seed(seed)
    if prompts is not None:
        prompts = list(prompts)[: n_inputs or len(prompts)]
        if model.tokenizer is None:
            raise InputError(
                "there is no tokenizer to read the prompts with",
                file=model.path,
                remedy="Leave --prompts out, or put the tokenizer's files into the model's folder.",
            )
        rows, made = [encode(model, text) for text in prompts], f"the {len(prompts)} texts given"
    elif model.kind == "language" and not getattr(model.main.config, "is_encoder_decoder", False):
        rows = sample_texts(model, n - n // 2, generator)
        with applied(model.components, adapter):
            rows += sample_texts(model, n // 2, generator)
        made = (
            f"{n} texts of {rows[0].shape[1]} tokens, sampled at temperature 1 from the old base ({n - n // 2}) and "
            f"the old base with its adapter ({n // 2}), seed {seed}"
        )
    elif model.tokenizer is not None:
        texts = [sentence(i) for i in range(n)]
        rows, made = [encode(model, text) for text in texts], f"{n} plain English sentences"
    else:
        length = longest(model, RANDOM_TOKENS)
        rows = list(torch.randint(vocabulary_of(model), (n, 1, length), generator=generator))
        made = f"{n} sequences of {length} random token ids (there is no tokenizer), seed {seed}"
    return TextProbe(
        tuple(rows), made, list(prompts or ()), model.kind == "language", model.tokenizer, vocabulary_of(model)
    )


def sentence(i: int) -> str:
    """The i-th plain English sentence."""
    first = SENTENCES[i % len(SENTENCES)]
    # Past the end of the list sentences come in pairs, so that no input comes twice.
    return first if i < len(SENTENCES) else f"{first} {SENTENCES[(7 * i + i // len(SENTENCES)) % len(SENTENCES)]}"


@torch.no_grad()
def sample_texts(
    model: Loaded, n: int, generator: torch.Generator, tokens: int = SAMPLED_TOKENS, beginning: Tensor | None = None
) -> list[Tensor]:
    """``n`` texts drawn from the model's own distribution, (1, positions) each; a text goes on past its end token.

    Args:
        model: a language model that reads from left to right.
        n: how many.
        generator: of the draws.
        tokens: of each text, what is drawn and its start; of a given beginning, what is drawn behind it.
        beginning: ids (1, positions) that all texts begin with, in place of the start token or a random one.

    Raises:
        InputError: the model's logits are no numbers.
    """
    if n == 0:
        return []
    length = longest(model, tokens + (0 if beginning is None else beginning.shape[1]))
    vocabulary = vocabulary_of(model)
    start = getattr(model.main.config, "bos_token_id", None)
    if model.tokenizer is not None and model.tokenizer.bos_token_id is not None:
        start = model.tokenizer.bos_token_id
    if beginning is not None:
        ids = beginning[:, : max(1, length - 1)].repeat(n, 1)
    elif isinstance(start, int) and start < vocabulary:
        ids = torch.full((n, 1), start)
    else:
        ids = torch.randint(vocabulary, (n, 1), generator=generator)
    cache: Any = None
    caches = "past_key_values" in inspect.signature(model.main.forward).parameters
    while ids.shape[1] < length:
        # Models without a cache of keys and values (state-space ones) read the whole text again.
        step = ids if cache is None else ids[:, -1:]
        settings = {"past_key_values": cache, "use_cache": True} if caches else {}
        out = model.main(input_ids=step.to(model.device), **settings)
        cache = getattr(out, "past_key_values", None) if caches else None
        # The draw is made on the CPU: one seed gives the same texts on every device that computes alike.
        shares = out.logits[:, -1, :vocabulary].float().cpu().softmax(-1)
        if not bool(shares.isfinite().all()):
            raise InputError(
                "its outputs are no numbers (NaN)",
                file=model.path,
                remedy="Is the file undamaged, and the base the one that the adapter was trained on?",
            )
        ids = torch.cat([ids, torch.multinomial(shares, 1, generator=generator)], dim=1)
    return list(ids.unsqueeze(1))


def encode(model: Loaded, text: str) -> Tensor:
    """Token ids of a text, (1, positions)."""
    length = longest(model, MOST_TOKENS)
    ids = model.tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"].long()
    if ids.shape[1] == 0:
        raise InputError(f"a prompt has no tokens: {text!r}", file=model.path)
    return torch.as_tensor(ids)


def vocabulary_of(model: Loaded) -> int:
    """How many tokens the model knows."""
    return int(model.main.get_input_embeddings().weight.shape[0])


def text_config(model: Loaded) -> Any:
    """What a model reads texts by; of one that reads pictures, too, its language model's."""
    config = model.main.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def longest(model: Loaded, wanted: int) -> int:
    """The wanted number of tokens, or what the model can read at most."""
    config = text_config(model)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    # RoBERTa's positions begin at its padding index + 1: two of them are never used.
    return min([wanted, *(limit - 2 for limit in limits if isinstance(limit, int) and limit > 2)])


def _cut(rows: Sequence[Tensor], model: Loaded) -> tuple[Tensor, ...]:
    length = longest(model, max(row.shape[1] for row in rows))
    return tuple(row[:, :length] for row in rows)


def same_tokens(old: Any, new: Any) -> bool:
    """Whether two tokenizers make the same ids of a text, up to tokens that one of them has beside the other's.

    Every token that both know has one id, the smaller vocabulary lies in the larger, and plain text is split alike.
    Ids alone don't tell: more merges, numbered on, leave all older ids in place and yet split every word otherwise.
    """
    ours, theirs = old.get_vocab(), new.get_vocab()
    fewer, more = (ours, theirs) if len(ours) <= len(theirs) else (theirs, ours)
    if any(more.get(token) != number for token, number in fewer.items()):
        return False
    texts = list(SENTENCES[:8])
    split = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (old, new)]
    return [list(ids) for ids in split[0]] == [list(ids) for ids in split[1]]
