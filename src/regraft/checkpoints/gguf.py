"""GGUF: language models of llama.cpp by transformers' names, image and video models by diffusers'.

Values are dequantised tensor by tensor, or row by row, in float32, when they are asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.adapter import MODEL
from regraft.checkpoints import Checkpoint, Reader
from regraft.checkpoints._gguf_file import MAGIC, GgufFile, GgufTensor, read_gguf
from regraft.checkpoints._gguf_names import ARCHITECTURES, transformers_names
from regraft.checkpoints._views import Reshaped
from regraft.checkpoints.single_file import split_components
from regraft.errors import InputError, reading
from regraft.tensors import TensorRef, n_bytes

# Key-value pairs that transformers' config.json has under another name.
_CONFIG = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
}
# The image tools keep shapes here that ggml has no room for (more than four dimensions, or too small rows).
_SHAPE = "comfy.gguf.orig_shape."


def _detect(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with reading(path), path.open("rb") as stream:
        return stream.read(4) == MAGIC


def _parts(path: Path) -> list[Path]:
    """Every file of a model that llama.cpp split, in order."""
    found = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if found is None:
        return [path]
    parts = [path.with_name(f"{found[1]}-{i:05}-of-{found[3]}.gguf") for i in range(1, int(found[3]) + 1)]
    for part in parts:
        if not part.is_file():
            raise InputError("a part of the split model is missing", file=part, remedy="Download all parts.")
    return parts


def _joined(path: Path) -> GgufFile:
    tensors: dict[str, GgufTensor] = {}
    fields: dict[str, Any] = {}
    for part in _parts(path):
        content = read_gguf(part)
        fields = {**content.fields, **fields}
        for name, ref in content.tensors.items():
            if name in tensors:
                raise InputError("is in two parts of the split model", file=part, key=name)
            tensors[name] = ref
    return GgufFile(tensors, fields)


def _kind(tensors: Mapping[str, GgufTensor]) -> str:
    """The type that most bytes are stored in."""
    sizes = Counter[str]()
    for ref in tensors.values():
        sizes[ref.kind] += n_bytes(ref.raw)
    return sizes.most_common(1)[0][0] if sizes else "empty"


def _config(fields: Mapping[str, Any], arch: str, tensors: Mapping[str, TensorRef]) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": ARCHITECTURES[arch].model_type}
    for key, name in _CONFIG.items():
        value = fields.get(f"{arch}.{key}")
        if value is not None:
            config[name] = value
    return config | {"tie_word_embeddings": "output.weight" not in tensors}


def _shaped(file: GgufFile) -> dict[str, TensorRef]:
    """Every tensor in the shape that the original model has it in."""
    tensors: dict[str, TensorRef] = dict(file.tensors)
    for name, ref in file.tensors.items():
        shape = file.fields.get(f"{_SHAPE}{name}")
        if isinstance(shape, list) and all(isinstance(size, int) for size in shape):
            try:
                tensors[name] = Reshaped(ref, tuple(shape))
            except ValueError as error:
                raise InputError(str(error), file=ref.raw.file, key=name) from None
    return tensors


def _read(path: Path) -> Checkpoint:
    file = _joined(path)
    if not file.tensors:
        raise InputError("holds no tensors", file=path, remedy="Download or copy it again.")
    description = f"gguf {_kind(file.tensors)}"
    arch = str(file.fields.get("general.architecture", ""))
    model = transformers_names(file.tensors, arch, file.fields)
    if model is not None:
        shown, left_out = model
        return Checkpoint({MODEL: shown}, {MODEL: _config(file.fields, arch, file.tensors)}, description, left_out)
    components, rest = split_components(_shaped(file))
    if MODEL in components:
        description = f"{description}, names as stored (architecture {arch[:64] or 'not stated'!r})"
    return Checkpoint(components, {}, description, rest)


READER = Reader("GGUF", 15, _detect, _read)
