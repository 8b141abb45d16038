"""Embeddings of added tokens in a port: as they are, or by a rotation of the text encoder's width; else refused."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from regraft.adapter import MODEL, Adapter, ModuleRef, TokenRef
from regraft.base import Base
from regraft.migration import Migration
from regraft.tensors import InMemory, TensorRef, read_rows
from regraft.transport import LinearMap

# The table of input embeddings, by the end of its name: CLIP's, a language model's, T5's, BERT's.
_TABLES = ("token_embedding.weight", "embed_tokens.weight", "shared.weight", "word_embeddings.weight", "wte.weight")
_SAMPLE_ROWS = 256


def embedding_table(base: Base, component: str) -> TensorRef | None:
    """The input embeddings of a text encoder, (vocabulary, width), or None."""
    here: Mapping[str, TensorRef] = base.components.get(component, {})
    if not here and set(base.components) == {MODEL}:
        here = base.components[MODEL]
    return next((ref for name, ref in here.items() if name.endswith(_TABLES)), None)


def width_map(token: TokenRef, migration: Migration) -> LinearMap | None:
    """R (width, width') of the table that a token's vectors belong to, where the method rotates its width; else None.

    A vector that replaces what the encoder gives out is not in that space.
    """
    components = {ref.component for ref in migration.entries}
    home = MODEL if components == {MODEL} else token.component
    for ref, entry in migration.entries.items():
        mine = ref.component == home and f"{ref.path}.weight".endswith(_TABLES)
        if mine and entry.transport is not None and entry.transport.rotates and not token.output:
            return entry.transport.terms[0][1]
    return None


def moved_tokens(tokens: Mapping[TokenRef, TensorRef], migration: Migration) -> dict[TokenRef, TensorRef]:
    """The vectors on the new base."""
    moved: dict[TokenRef, TensorRef] = {}
    for token, ref in tokens.items():
        right = width_map(token, migration)
        moved[token] = ref
        if right is not None and not right.is_identity:
            vectors = ref.load()
            rows = vectors.float().reshape(-1, vectors.shape[-1])
            turned = right.on_the_right(rows).reshape(*vectors.shape[:-1], -1)
            moved[token] = InMemory(turned.to(vectors.dtype).contiguous())
    return moved


def tables_in(adapter: Adapter, base: Base) -> list[ModuleRef]:
    """The base's modules that hold the embeddings which an adapter's tokens belong to."""
    components = {token.component if token.component in base.components else MODEL for token in adapter.tokens}
    found = []
    for component in components & set(base.components):
        names = (name for name in base.components[component] if name.endswith(_TABLES))
        found += [ModuleRef(component, name.removesuffix(".weight")) for name in names]
    return found


def refused_tokens(adapter: Adapter, new: Base | None, migration: Migration) -> dict[TokenRef, str]:
    """The tokens that the new base's text encoder has no place for → why. Headers alone are read."""
    refused: dict[TokenRef, str] = {}
    for token, ref in adapter.tokens.items():
        table = embedding_table(new, token.component) if new is not None else None
        right = width_map(token, migration)
        if table is not None and right is not None and right.T.out_features == table.shape[-1]:
            continue
        if table is not None and not token.output and table.shape[-1] != ref.shape[-1]:
            refused[token] = f"its vectors are {ref.shape[-1]} wide, the new {token.component}'s {table.shape[-1]}"
        elif new is not None and table is None and MODEL not in new.components:
            refused[token] = f"the new base has no {token.component} with a table of embeddings"
    return refused


def tokens_note(tokens: Mapping[TokenRef, TensorRef], old: Base | None, new: Base | None, migration: Migration) -> str:
    """What a port says of the tokens that it carries: how far the embeddings around them have moved."""
    maps = [width_map(token, migration) for token in tokens]
    if all(map_ is not None and not map_.is_identity for map_ in maps):
        return f"the embeddings of added tokens are turned with the text encoder's width, by {migration.used}"
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
