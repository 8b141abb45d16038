"""The map between two hidden widths that the embeddings of common tokens show."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from regraft.base import Base
from regraft.errors import reading, understanding
from regraft.tokens import embedding_table

# How byte-level and SentencePiece tokens spell a space, and byte-level ones a line break.
SPELT = str.maketrans({"\u0120": " ", "\u2581": " ", "\u010a": "\n"})


def common_tokens(old: Base, new: Base, rows: tuple[int, int], *, spelt: bool = False) -> tuple[list[int], list[int]]:
    """The ids of the tokens that both bases have, in each of them.

    By their names in both ``tokenizer.json``; where one is missing, the same ids are taken to be the same tokens.

    Args:
        old: the old base.
        new: the new base.
        rows: of the two embedding tables; ids beyond have no embedding.
        spelt: take tokens for the same that stand for the same characters, however each tokenizer writes a space.
    """
    names = _vocabulary(old.path, spelt), _vocabulary(new.path, spelt)
    if names[0] is None or names[1] is None:
        shared = list(range(min(rows)))
        return shared, shared
    ids = [
        (index, names[1][name])
        for name, index in sorted(names[0].items(), key=lambda item: item[1])
        if name in names[1] and index < rows[0] and names[1][name] < rows[1]
    ]
    return [one for one, _ in ids], [other for _, other in ids]


def _vocabulary(path: Path, spelt: bool) -> dict[str, int] | None:
    """Token (or what it stands for) → id of a ``tokenizer.json`` beside the weights, or None."""
    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    if not file.is_file():
        return None
    with reading(file), understanding("tokenizer.json", file):
        found = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
        # Unigram models list (token, score).
        ids = dict(found) if isinstance(found, dict) else {token: i for i, (token, *_) in enumerate(found)}
        return {token.translate(SPELT): i for token, i in ids.items()} if spelt else ids


def common_embeddings(old: Base, new: Base, component: str, *, spelt: bool = False) -> tuple[Tensor, Tensor] | None:
    """The embeddings of the common tokens, (n, h) and (n, h'), float32; None where a base has no table of them."""
    tables = embedding_table(old, component), embedding_table(new, component)
    if tables[0] is None or tables[1] is None:
        return None
    ids = common_tokens(old, new, (tables[0].shape[0], tables[1].shape[0]), spelt=spelt)
    if not ids[0]:
        return None
    return tables[0].load().float()[ids[0]], tables[1].load().float()[ids[1]]


def width_map(old: Tensor, new: Tensor, *, rtol: float | None = None) -> Tensor:
    """W_x = E_old⁺ E_new, (h, h'): the least-squares map of the common tokens' embeddings.

    Args:
        old: (n, h).
        new: (n, h').
        rtol: directions whose singular value is less than this share of the largest are left out; None for float64's.
    """
    found: Tensor = torch.linalg.pinv(old.double(), rtol=rtol).float() @ new
    return found
