"""The map between two hidden widths that the embeddings of common tokens show."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from regraft.base import Base
from regraft.errors import reading, understanding
from regraft.tokens import embedding_table


def common_tokens(old: Base, new: Base, rows: tuple[int, int]) -> tuple[list[int], list[int]]:
    """The ids of the tokens that both bases have, in each of them.

    By their names in both ``tokenizer.json``; where one is missing, the same ids are taken to be the same tokens.

    Args:
        old: the old base.
        new: the new base.
        rows: of the two embedding tables; ids beyond have no embedding.
    """
    names = _vocabulary(old.path), _vocabulary(new.path)
    if names[0] is None or names[1] is None:
        shared = list(range(min(rows)))
        return shared, shared
    ids = [
        (index, names[1][name])
        for name, index in sorted(names[0].items(), key=lambda item: item[1])
        if name in names[1] and index < rows[0] and names[1][name] < rows[1]
    ]
    return [one for one, _ in ids], [other for _, other in ids]


def _vocabulary(path: Path) -> dict[str, int] | None:
    """Token → id of a ``tokenizer.json`` beside the weights, or None."""
    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    if not file.is_file():
        return None
    with reading(file), understanding("tokenizer.json", file):
        found = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
        # Unigram models list (token, score).
        return dict(found) if isinstance(found, dict) else {token: i for i, (token, *_) in enumerate(found)}


def common_embeddings(old: Base, new: Base, component: str) -> tuple[Tensor, Tensor] | None:
    """The embeddings of the common tokens, (n, h) and (n, h'), float32; None where a base has no table of them."""
    tables = embedding_table(old, component), embedding_table(new, component)
    if tables[0] is None or tables[1] is None:
        return None
    ids = common_tokens(old, new, (tables[0].shape[0], tables[1].shape[0]))
    if not ids[0]:
        return None
    return tables[0].load().float()[ids[0]], tables[1].load().float()[ids[1]]


def width_map(old: Tensor, new: Tensor, *, rtol: float | None = None) -> Tensor:
    """W_x = E_old⁺ E_new, (h, h'): the least-squares map of the common tokens' embeddings.

    Args:
        old: (n, h).
        new: of the same tokens, (n, h').
        rtol: directions of ``old`` that are smaller, relative to the largest, are left out; None for torch's default.
    """
    found: Tensor = torch.linalg.pinv(old.double(), rtol=rtol).float() @ new
    return found
