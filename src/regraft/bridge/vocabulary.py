"""From the new base's tokens to the old base's: of the text so far, and back for scores of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.bridge.groups import LEAST, Groups
from regraft.errors import InputError
from regraft.probes.sentences import SENTENCES
from regraft.probes.text import same_tokens, vocabulary_of
from regraft.refine.words import spelt
from regraft.runtime.load import Loaded

_ROLES = ("bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """What the tokens of two language models have in common.

    Attributes:
        old, new: their tokenizers; None where the ids are the same.
        to_old: (new rows,), the old id of every new one, −1 for those without.
        groups: which tokens of the two begin alike, for what is said of the next one.
        alike: plain text is split at the same places, so that ids are exchanged one by one.
    """

    old: Any
    new: Any
    to_old: Tensor
    groups: Groups
    alike: bool

    @classmethod
    def of(cls, old: Loaded, new: Loaded) -> Vocabulary:
        """Tokens are the same that stand for the same characters; the start and the end of a text by their role.

        Raises:
            InputError: the models share no token, or one has no tokenizer and the vocabularies differ.
        """
        rows, wanted = vocabulary_of(old), vocabulary_of(new)
        ours, theirs = old.tokenizer, new.tokenizer
        if ours is None and theirs is None and rows == wanted:
            return cls._with_groups(None, None, torch.arange(wanted), rows, True)
        if ours is None or theirs is None:
            raise InputError(
                "there is no tokenizer to tell which tokens the two models share",
                file=(old if ours is None else new).path,
                remedy="Put the tokenizer's files into the model's folder.",
            )
        if same_tokens(ours, theirs):
            numbers = torch.arange(wanted)
            return cls._with_groups(ours, theirs, numbers.where(numbers < rows, torch.tensor(-1)), rows, True)
        to_old = _shared(ours, theirs, rows, wanted)
        if not bool((to_old >= 0).any()):
            raise InputError(f"its tokenizer shares no token with that of {old.path}", file=new.path)
        for mine, its in _special(ours, theirs):
            if mine < rows and its < wanted:
                to_old[its] = mine
        alike = _alike(ours, theirs, to_old)
        unknown = ours.unk_token_id, theirs.unk_token_id
        if None not in unknown and unknown[0] < rows and unknown[1] < wanted:
            # Only now: two that know none of the words would split them alike.
            to_old[unknown[1]] = unknown[0]
        return cls._with_groups(ours, theirs, to_old, rows, alike)

    @classmethod
    def _with_groups(cls, ours: Any, theirs: Any, to_old: Tensor, rows: int, alike: bool) -> Vocabulary:
        # Where text is split alike, what the other side lacks was added for itself, and no part of a word.
        grouped = Groups.of(None, None, rows, to_old) if alike else Groups.of(ours, theirs, rows, to_old)
        return cls(ours, theirs, to_old, grouped, alike)

    def exchanged(self, ids: Sequence[int]) -> list[int] | None:
        """Old ids one by one; None where the text must be split anew."""
        found: list[int] = self.to_old[torch.tensor(ids, dtype=torch.long)].tolist()
        return found if self.alike and min(found, default=-1) >= 0 else None

    def context(self, ids: Sequence[int]) -> list[int]:
        """The old base's tokens for the same text, at least one.

        Args:
            ids: of the new base, without padding.
        """
        found = self.exchanged(ids)
        if found is not None:
            return found
        split = self._split(ids)
        bos: int | None = self.old.bos_token_id
        begins = bos is not None and self.old("")["input_ids"][:1] == [bos]
        if bos is not None and (not split or (begins and split[0] != bos)):
            return [bos, *split]
        return split or [self.old.eos_token_id or 0]

    def _split(self, ids: Sequence[int]) -> list[int]:
        """The text between special tokens is split anew; of those, the ones that both have stay where they are."""
        special, split, part = set(self.new.all_special_ids), list[int](), list[int]()
        for token in [*ids, None]:
            if token is not None and token not in special:
                part.append(token)
                continue
            if part:
                # At the end there may be bytes of a character that is still to be finished.
                text = self.new.decode(part, clean_up_tokenization_spaces=False).rstrip("\ufffd")
                split += self.old(text, add_special_tokens=False)["input_ids"]
                part = []
            if token is not None and int(self.to_old[token]) >= 0:
                split.append(int(self.to_old[token]))
        return split

    def change(self, old: Tensor, with_adapter: Tensor) -> Tensor:
        """What the adapter adds to log p of each group of tokens, (rows, groups), by logits (rows, old).

        Tokens of no group get 0 when it is spread: E_old[p_adapted / p_old] = 1, so a token of which nothing is known
        keeps its weight. The mean of the changes would not do: each token counts the same in it, and most are
        improbable.
        """
        # An adapter with added tokens has more columns than its base.
        n = min(old.shape[1], with_adapter.shape[1])
        before, after = (self.said(found[:, :n]) for found in (old, with_adapter))
        # What the old base held impossible has no factor.
        return (after - before).masked_fill(before <= LEAST, 0.0)

    def said(self, logits: Tensor) -> Tensor:
        """log p of each group by the old base's logits, (rows, groups)."""
        return self.groups.masses(logits.log_softmax(-1), self.groups.old)


def _shared(ours: Any, theirs: Any, rows: int, wanted: int) -> Tensor:
    found, to_old = spelt(ours, rows), torch.full((wanted,), -1)
    special = set(ours.all_special_tokens) | set(theirs.all_special_tokens)
    for token, i in spelt(theirs, wanted).items():
        if token in found and token not in special:
            to_old[i] = found[token]
    return to_old


def _special(ours: Any, theirs: Any) -> list[tuple[int, int]]:
    """Special tokens of one name, but for the unknown one, and those of one role: (old id, new id)."""
    named = dict(zip(ours.all_special_tokens, ours.all_special_ids, strict=True))
    pairs = zip(theirs.all_special_tokens, theirs.all_special_ids, strict=True)
    found = [(named[token], i) for token, i in pairs if token in named and token != theirs.unk_token]
    roles = ((getattr(ours, role), getattr(theirs, role)) for role in _ROLES)
    return [*found, *((mine, its) for mine, its in roles if mine is not None and its is not None)]


def _alike(ours: Any, theirs: Any, to_old: Tensor) -> bool:
    texts = list(SENTENCES[:8])
    mine, its = (tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (ours, theirs))
    # A sentence of unknown tokens would tell nothing: these have no counterpart, and so are never equal.
    return all(list(a) == to_old[torch.tensor(b, dtype=torch.long)].tolist() for a, b in zip(mine, its, strict=True))
