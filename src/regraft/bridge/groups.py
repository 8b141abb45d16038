"""Tokens of two vocabularies that begin alike, in groups: what one model says of a group, the other can be told.

Of "functions" an old base with the token "function" says how likely "function" is and nothing of the rest. So a token
that the other side lacks is in the group of the longest token there that it begins with, and what is known of a group
is its probability as a whole; who in it comes next is left to the model whose tokens they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.refine.firsts import SPELT

_BYTE = re.compile(r"<0x([0-7][0-9A-F])>")
#: Stands for log 0 where two of them are subtracted.
LEAST = -1e30
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# Byte-level tokenizers write each byte as one character: itself where it can be seen, else one from U+0100 on (GPT-2).
_BYTES = {chr(b): b for b in _PRINTED} | {
    chr(0x100 + i): b for i, b in enumerate(b for b in range(0x100) if b not in _PRINTED)
}


@dataclass(frozen=True)
class Groups:
    """The group of every token of either side.

    Attributes:
        old, new: (tokens,) of either side; ``n`` for those of no group.
        n: how many groups.
    """

    old: Tensor
    new: Tensor
    n: int

    @classmethod
    def of(cls, ours: Any, theirs: Any, rows: int, to_old: Tensor) -> Groups:
        """Pairs of counterparts, and the tokens without one where they belong.

        Args:
            ours: the old base's tokenizer; None where all that there is to join are the counterparts.
            theirs: the new base's.
            rows: of the old base's table.
            to_old: (new rows,), the old id of every new one, −1 for those without.
        """
        pairs = [(old, new) for new, old in enumerate(to_old.tolist()) if old >= 0]
        if ours is not None and theirs is not None:
            texts, other = _texts(ours, rows), _texts(theirs, len(to_old))
            pairs += [(old, new) for new, old in _prefixes(other, {new for _, new in pairs}, texts)]
            pairs += list(_prefixes(texts, {old for old, _ in pairs}, other))
        parent = list(range(rows + len(to_old)))
        for old, new in pairs:
            parent[_root(parent, rows + new)] = _root(parent, old)
        numbers: dict[int, int] = {}
        joined = {
            i: numbers.setdefault(_root(parent, i), len(numbers)) for old, new in pairs for i in (old, rows + new)
        }
        found = torch.tensor([joined.get(i, len(numbers)) for i in range(len(parent))])
        return cls(found[:rows], found[rows:], len(numbers))

    def masses(self, found: Tensor, of: Tensor) -> Tensor:
        """log p of each group, (rows, groups), of log p of one side's tokens (rows, tokens).

        Args:
            found: log-probabilities.
            of: `old` or `new`, that side's.
        """
        # A head may have fewer columns than the table of embeddings has rows, or more.
        n = min(found.shape[1], len(of))
        found, of = found[:, :n], of[:n].to(found.device)
        most = found.new_full((len(found), self.n + 1), LEAST)
        most = most.scatter_reduce(1, of.expand_as(found), found, "amax")
        sums = torch.zeros_like(most).index_add(1, of, (found - most[:, of]).exp())
        return (most + sums.log())[:, :-1].clamp(min=LEAST)

    def spread(self, change: Tensor) -> Tensor:
        """A change of log p of groups, (rows, groups), as one of the new tokens', (rows, new); 0 for the others."""
        return torch.nn.functional.pad(change, (0, 1))[:, self.new.to(change.device)]


def _texts(tokenizer: Any, rows: int) -> dict[int, str]:
    """What plain tokens stand for, of those that stand for whole characters at the beginning of something.

    Left out are those added by hand, those of the control of a chat, parts of a character, and WordPiece's ``##ing``.
    """
    apart = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    plain = {token: i for token, i in tokenizer.get_vocab().items() if i < rows and token and token not in apart}
    is_bytes = any("\u0120" in token for token in plain) and all(c in _BYTES for token in plain for c in token)
    texts = {i: _of_bytes(token) if is_bytes else _spelt(token) for token, i in plain.items()}
    pieces = "##e" in plain
    return {i: text for i, text in texts.items() if text and not (pieces and text.startswith("##"))}


def _spelt(token: str) -> str:
    byte = _BYTE.fullmatch(token)
    return token.translate(SPELT) if byte is None else chr(int(byte[1], 16))


def _of_bytes(token: str) -> str:
    try:
        return bytes(_BYTES[c] for c in token).decode()
    except UnicodeDecodeError:
        return ""


def _prefixes(texts: Mapping[int, str], done: set[int], other: Mapping[int, str]) -> Iterator[tuple[int, int]]:
    """(token, token of the other side): the longest that it begins with, for each that is not done yet."""
    numbers = {text: i for i, text in sorted(other.items())}
    for token, text in sorted(texts.items()):
        if token in done:
            continue
        known = (numbers[text[:n]] for n in range(len(text), 0, -1) if text[:n] in numbers)
        if (found := next(known, None)) is not None:
            yield token, found


def _root(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i
