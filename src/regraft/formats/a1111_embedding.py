"""Embeddings as Automatic1111, ComfyUI, kohya and OneTrainer keep them: one token per file, named by the file.

Facts (sd-scripts 48d368f, OneTrainer 23df3832, ComfyUI 0.3.64):

- ``.pt`` (CompVis' textual inversion, A1111): a dict with ``string_to_token`` ``{"*": 265}``, ``string_to_param``
  ``{"*": (vectors, width)}`` (a ``ParameterDict`` in the oldest), ``name``, ``step``, ``sd_checkpoint``.
- ``.safetensors``: ``emb_params`` (vectors, width); for several text encoders ``clip_l`` and ``clip_g`` (SDXL), or
  ``clip_l`` and ``t5`` (Flux). OneTrainer's ``…_out`` replaces the encoder's output.
- The file's name is what prompts say. Inside a ``.pt`` there is a ``name`` too, which we go by.
- Written are safetensors files alone: of a ``.pt`` the vectors become ``emb_params``, and the rest metadata.
"""

from __future__ import annotations

from collections.abc import Mapping

from regraft.adapter import Adapter, TokenRef
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._bundled_embeddings import (
    UNNAMED,
    check_embedding,
    encoder_of,
    is_short_name,
    of_one_encoder,
    short_name,
)
from regraft.formats._common import contiguous, training_metadata
from regraft.formats._factors import cannot_hold
from regraft.tensors import TensorRef

_PARAM = "string_to_param."
_TOKEN = "string_to_token."
_NAME = "name"


def _short(key: str) -> str:
    return UNNAMED[1] if key.startswith(_PARAM) else key


def _detect(file: AdapterFile) -> bool:
    vectors = [key for key in file.tensors if not key.startswith(_TOKEN)]
    return bool(vectors) and all(is_short_name(_short(key)) for key in vectors)


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    name = file.metadata.get(_NAME) or file.path.stem
    vectors = {key: ref for key, ref in file.tensors.items() if not key.startswith(_TOKEN)}
    beside = [_short(key) for key in vectors]
    alone = beside.count(UNNAMED[1]) <= 1
    tokens: dict[TokenRef, TensorRef] = {}
    keys: dict[TokenRef, str] = {}
    for key, ref in vectors.items():
        check_embedding(ref, file.path, key)
        component, output = encoder_of(_short(key), beside, ref.shape[-1])
        token = TokenRef(component, name if alone else f"{name}{key.removeprefix(_PARAM)}", output)
        tokens[token], keys[token] = ref, key
    family = "sdxl" if {"clip_l", "clip_g"} <= set(beside) and "t5" not in beside and "t5xxl" not in beside else None
    return Adapter({}, "a1111-embedding", {"tokens": keys}, file.metadata, family=family, tokens=tokens, path=file.path)


def _write(adapter: Adapter) -> Written:
    if adapter.updates:
        module = next(iter(adapter.updates))
        raise cannot_hold("embedding", "changes of weights", module)
    names = {token.token for token in adapter.tokens}
    if len(names) != 1:
        other = sorted(names)[1] if len(names) > 1 else None
        raise cannot_hold("embedding", "more or less than one token", other, "Write textual-inversion.")
    own = adapter.format == "a1111-embedding"
    keys: Mapping[TokenRef, str] = adapter.layout.get("tokens", {}) if own else {}
    single = of_one_encoder(adapter.tokens)
    tensors: dict[str, TensorRef] = {}
    for token, ref in adapter.tokens.items():
        key = keys.get(token, "")
        if not key or key.startswith(_PARAM):
            key = f"{UNNAMED[0]}{'_out' if token.output else ''}" if single else short_name(token, ref.shape[-1])
        tensors[key] = ref
    metadata = dict(adapter.metadata) if own else {"format": "pt", **training_metadata(adapter.metadata)}
    if not own:
        metadata[_NAME] = next(iter(names))
    return Written(contiguous(tensors), metadata)


FORMAT = Format("a1111-embedding", "embedding of A1111, ComfyUI, kohya, OneTrainer", 50, _detect, _read, _write)
