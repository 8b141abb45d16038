"""The language models' tokenizers: one of characters, and one of pairs merged by frequency."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.bench.language_models import CONTEXT
from regraft.bench.language_text import CHARACTERS
from regraft.runtime.libraries import library


def character_tokenizer() -> Any:
    """Each character is a token; its id is its place in `CHARACTERS`."""
    models = library("tokenizers").models
    return _fast(models.BPE(vocab={c: i for i, c in enumerate(CHARACTERS)}, merges=[], fuse_unk=False))


def pair_tokenizer(texts: Iterable[str], size: int) -> Any:
    """Byte-pair encoding of ``size`` tokens, learnt on ``texts``; merges stay within words."""
    tokenizers = library("tokenizers")
    learnt = _bare(tokenizers.models.BPE(fuse_unk=False))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=list(CHARACTERS), show_progress=False, special_tokens=[]
    )
    learnt.train_from_iterator(texts, trainer)
    return _wrapped(learnt)


def spelling(tokenizer: Any) -> list[list[int]]:
    """For each token of ``tokenizer``, the character tokens that spell it."""
    place = {c: i for i, c in enumerate(CHARACTERS)}
    return [[place[c] for c in tokenizer.convert_ids_to_tokens(i)] for i in range(len(tokenizer))]


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids, (tokens,); a long text is read in parts."""
    # The tokenizers library takes quadratic time over one long word, and much memory over a long text.
    parts = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
    ids: Sequence[Sequence[int]] = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([i for part in ids for i in part])


def _fast(model: Any) -> Any:
    return _wrapped(_bare(model))


def _bare(model: Any) -> Any:
    tokenizers = library("tokenizers")
    bare = tokenizers.Tokenizer(model)
    # What `plain` makes of unknown characters, one for one, so that offsets into the text stay true.
    bare.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(r"[^\n\x20-\x7e]"), "?")
    words = tokenizers.Regex(r"\n+| ?[A-Za-z]+| +|[^A-Za-z ]")
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Split(words, "isolated")
    bare.decoder = tokenizers.decoders.Fuse()
    return bare


def _wrapped(bare: Any) -> Any:
    return library("transformers").PreTrainedTokenizerFast(
        tokenizer_object=bare, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )
