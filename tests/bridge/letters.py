"""Language models over a few letters: what is one token of one of them may be two of another's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.runtime import Loaded, load_model
from verify import tiny

LETTERS = ("a", "b", "c", "d", " ")


def model(folder: Path, merges: Sequence[tuple[str, str]], *, seed: int, letters: Sequence[str] = LETTERS) -> Loaded:
    """A tiny LLaMA whose tokenizer has these letters and merges, in this order."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    tiny.llama(folder, seed=seed, vocab=len(words))
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, list(merges), unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return load_model(folder)
