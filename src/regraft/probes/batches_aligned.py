"""The same texts in two models' own tokens: positions answer to each other where both have read the same characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.probes.text import longest
from regraft.runtime.both import BothModels, Side
from regraft.runtime.load import Loaded


@dataclass(frozen=True)
class Aligned:
    """Some texts, filled up on the right: no model that reads from left to right sees the filling.

    Attributes:
        ids: side → token ids (n, positions of that side).
        rows: side → rows of its flattened (n · positions) activations; the i-th of both end at the same character.
    """

    ids: Mapping[Side, Tensor]
    rows: Mapping[Side, Tensor]


def align(texts: Sequence[str], models: BothModels) -> Aligned:
    """Texts in the tokens of both models.

    Raises:
        InputError: a tokenizer does not tell which characters its tokens stand for, or no position answers to another.
    """
    told = {side: [_tokens(models.side(side), text) for text in texts] for side in ("old", "new")}
    lengths = {side: max(len(ids) for ids, _ in found) for side, found in told.items()}
    ids: dict[Side, Tensor] = {}
    rows: dict[Side, list[int]] = {"old": [], "new": []}
    for side in ("old", "new"):
        filled = [torch.tensor(found + [0] * (lengths[side] - len(found))) for found, _ in told[side]]
        ids["old" if side == "old" else "new"] = torch.stack(filled)
    for i, ((_, ends_old), (_, ends_new)) in enumerate(zip(told["old"], told["new"], strict=True)):
        place = {end: position for position, end in enumerate(ends_new) if end > 0}
        for position, end in enumerate(ends_old):
            if end in place:
                rows["old"].append(i * lengths["old"] + position)
                rows["new"].append(i * lengths["new"] + place[end])
    if not rows["old"]:
        raise InputError("no token of its ends where one of the old base does", file=models.new.path)
    return Aligned(ids, {side: torch.tensor(found) for side, found in rows.items()})


def _tokens(model: Loaded, text: str) -> tuple[list[int], list[int]]:
    """Ids of a text's tokens, and the character that each ends before; 0 for those that stand for none."""
    length = longest(model, 1 << 16)
    try:
        found = model.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=length)
    except (NotImplementedError, ValueError):
        raise InputError(
            "its tokenizer does not tell which characters a token stands for",
            file=model.path,
            remedy="Take a method that runs no model, or give the model its tokenizer.json.",
        ) from None
    return list(found["input_ids"]), [end if end > start else 0 for start, end in found["offset_mapping"]]
