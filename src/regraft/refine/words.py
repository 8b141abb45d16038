"""The words that two models share, and how their embeddings differ: where the space of hidden states went."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regraft.refine.firsts import SPELT
from regraft.runtime.both import BothModels

#: Directions of embeddings that are smaller than this, relative to the largest, are rounding's: a wider base may have
#: been made of a narrower one, and hold no more than that.
NOISE = 1e-4


def shared_embeddings(models: BothModels) -> tuple[Tensor, Tensor]:
    """Embeddings of the tokens that both models have, (n, h) and (n, h'), float32 on the CPU.

    Tokens are the same that stand for the same characters, however each tokenizer spells a space; where one of the
    models has no tokenizer, those of the same number.
    """
    old, new = (side.main.get_input_embeddings().weight.detach().float().cpu() for side in (models.old, models.new))
    if models.old.tokenizer is None or models.new.tokenizer is None:
        n = min(len(old), len(new))
        return old[:n], new[:n]
    ours, theirs = (spelt(side.tokenizer, len(table)) for side, table in ((models.old, old), (models.new, new)))
    shared = [(i, theirs[token]) for token, i in ours.items() if token in theirs]
    return old[[i for i, _ in shared]], new[[i for _, i in shared]]


def spelt(tokenizer: Any, rows: int) -> dict[str, int]:
    """What tokens stand for → number, in the order of numbers; those beyond the table have no embedding."""
    found = sorted(tokenizer.get_vocab().items(), key=lambda one: one[1])
    return {token.translate(SPELT): i for token, i in found if i < rows}
