"""diffusers' textual inversions: ``learned_embeds.safetensors`` or ``.bin``, the token's own text as the key.

Facts (diffusers 0.42):

- ``{"<cat-toy>": (vectors, width)}``, or (width,) in older files. ``load_textual_inversion`` takes one token per file;
  of several vectors the second is the token ``<cat-toy>_1``, and so on.
- A file is for one text encoder. SDXL's training script saves the second one's as ``learned_embeds_2.safetensors``:
  only the width (768 or 1280) tells them apart.
- Nothing but the key says that such a file is one. It is taken for one where all keys are in angle brackets, or where
  its only tensor has the width of a known text encoder and at most 128 vectors.
"""

from __future__ import annotations

import re

from regraft.adapter import Adapter, TokenRef
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._bundled_embeddings import check_embedding, component_of_width, of_one_encoder
from regraft.formats._common import contiguous, training_metadata
from regraft.formats._factors import cannot_hold
from regraft.tensors import TensorRef

_BRACKETED = re.compile(r"<[^<>]+>")
_WIDTHS = (768, 1024, 1280, 2048, 4096)
_MOST_VECTORS = 128


def _detect(file: AdapterFile) -> bool:
    if file.config is not None:
        return False
    if all(_BRACKETED.fullmatch(key) for key in file.tensors):
        return True
    (key, ref), *more = file.tensors.items()
    plain = "." not in key and ":" not in key and len(ref.shape) in (1, 2)
    return not more and plain and ref.shape[-1] in _WIDTHS and (len(ref.shape) == 1 or ref.shape[0] <= _MOST_VECTORS)


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    tokens: dict[TokenRef, TensorRef] = {}
    for key, ref in file.tensors.items():
        check_embedding(ref, file.path, key)
        tokens[TokenRef(component_of_width(ref.shape[-1]), key)] = ref
    return Adapter({}, "textual-inversion", metadata=file.metadata, tokens=tokens, path=file.path)


def _write(adapter: Adapter) -> Written:
    if adapter.updates:
        raise cannot_hold("textual-inversion", "changes of weights", next(iter(adapter.updates)))
    own = adapter.format == "textual-inversion"
    tensors: dict[str, TensorRef] = {}
    for token, ref in adapter.tokens.items():
        if token.output:
            raise cannot_hold("textual-inversion", "an embedding of the encoder's output", token)
        if not of_one_encoder(adapter.tokens):
            remedy = "diffusers has a file for each encoder: write a1111-embedding."
            raise cannot_hold("textual-inversion", "one token in several text encoders", token, remedy)
        tensors[token.token] = ref
    if not own and len(tensors) > 1:
        remedy = "diffusers loads one token per file: keep the old format."
        raise cannot_hold("textual-inversion", "several tokens", sorted(tensors)[1], remedy)
    metadata = dict(adapter.metadata) if own else {"format": "pt", **training_metadata(adapter.metadata)}
    metadata.pop("name", None)
    return Written(contiguous(tensors), metadata)


FORMAT = Format("textual-inversion", "diffusers textual inversion (learned_embeds)", 5, _detect, _read, _write)
