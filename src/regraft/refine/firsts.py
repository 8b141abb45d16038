"""What two tokenizers have in common even so: the next character. A distribution over tokens gives one over it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.runtime.both import BothModels, Side

#: How byte-level and SentencePiece tokens spell a space, and byte-level ones a line break.
SPELT = str.maketrans({"\u0120": " ", "\u2581": " ", "\u010a": "\n"})
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LEAST = 1e-7


@dataclass(frozen=True)
class FirstCharacters:
    """The class of every token of either side, by the character that it begins with; 0 for those with none.

    Attributes:
        classes: side → (tokens,).
        n: how many classes.
    """

    classes: Mapping[Side, Tensor]
    n: int

    @classmethod
    def of(cls, models: BothModels) -> FirstCharacters:
        numbers: dict[str, int] = {}
        sides: tuple[Side, Side] = ("old", "new")
        classes = {side: _classes(models.side(side).tokenizer, numbers) for side in sides}
        return cls(classes, len(numbers) + 1)

    def logs(self, logits: Tensor, side: Side) -> Tensor:
        """log p of the next token's first character, (rows, classes), of logits (rows, tokens)."""
        found = self.classes[side].to(logits.device)
        # Rows beyond the tokenizer's tokens are padding; tokens beyond the logits were never trained.
        found = torch.nn.functional.pad(found, (0, max(0, logits.shape[1] - len(found))))[: logits.shape[1]]
        sums = logits.new_zeros(len(logits), self.n).index_add(1, found, logits.softmax(-1))
        return sums.clamp_min(_LEAST).log()


def _classes(tokenizer: Any, numbers: dict[str, int]) -> Tensor:
    special, vocabulary = set(tokenizer.all_special_tokens), tokenizer.get_vocab()
    classes = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.long)
    # A vocabulary comes in no order, and one seed is to give the same sums.
    for token, i in sorted(vocabulary.items(), key=lambda found: found[1]):
        byte = _BYTE.fullmatch(token)
        text = token if byte is None else chr(int(byte[1], 16))
        if text and token not in special:
            classes[i] = numbers.setdefault(text.translate(SPELT)[0], len(numbers) + 1)
    return classes
