"""Embeddings of added tokens in a port: carried as they are, or refused where the new text encoder can't hold them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from regraft.adapter import MODEL, Adapter, TokenRef
from regraft.base import Base
from regraft.tensors import TensorRef, read_rows

# The table of input embeddings, by the end of its name: CLIP's, a language model's, T5's, BERT's.
_TABLES = ("token_embedding.weight", "embed_tokens.weight", "shared.weight", "word_embeddings.weight", "wte.weight")
_SAMPLE_ROWS = 256


def embedding_table(base: Base, component: str) -> TensorRef | None:
    """The input embeddings of a text encoder, (vocabulary, width), or None."""
    here: Mapping[str, TensorRef] = base.components.get(component, {})
    if not here and set(base.components) == {MODEL}:
        here = base.components[MODEL]
    return next((ref for name, ref in here.items() if name.endswith(_TABLES)), None)


def refused_tokens(adapter: Adapter, new: Base | None) -> dict[TokenRef, str]:
    """The tokens that the new base's text encoder has no place for → why. Headers alone are read."""
    refused: dict[TokenRef, str] = {}
    for token, ref in adapter.tokens.items():
        table = embedding_table(new, token.component) if new is not None else None
        if table is not None and not token.output and table.shape[-1] != ref.shape[-1]:
            refused[token] = f"its vectors are {ref.shape[-1]} wide, the new {token.component}'s {table.shape[-1]}"
        elif new is not None and table is None and MODEL not in new.components:
            refused[token] = f"the new base has no {token.component} with a table of embeddings"
    return refused


def tokens_note(tokens: Mapping[TokenRef, TensorRef], old: Base | None, new: Base | None) -> str:
    """What a port says of the tokens that it carries: how far the embeddings around them have moved."""
    what = "the embeddings of added tokens are carried as they are, no method maps them"
    drifts = {c: d for c in {t.component for t in tokens} if (d := _drift(old, new, c)) is not None}
    if not drifts:
        return f"{what}; how far the text encoder's own have moved is not known"
    moved = ", ".join(f"{component}'s own moved by {drift:.2%}" for component, drift in sorted(drifts.items()))
    return f"{what}; {moved}"


def _drift(old: Base | None, new: Base | None, component: str) -> float | None:
    """‖E_new − E_old‖ / ‖E_old‖ over evenly spread rows of the two tables; None where they can't be compared."""
    if old is None or new is None:
        return None
    before, after = embedding_table(old, component), embedding_table(new, component)
    if before is None or after is None or before.shape != after.shape:
        return None
    step = max(1, before.shape[0] // _SAMPLE_ROWS)
    rows = [range(row, row + 1) for row in range(0, before.shape[0], step)]
    was, now = read_rows(before, rows).float(), read_rows(after, rows).float()
    return float(torch.linalg.norm(now - was) / torch.linalg.norm(was).clamp_min(1e-12))
