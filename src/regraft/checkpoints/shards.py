"""A sharded checkpoint: ``*.index.json`` with ``{"weight_map": {name: shard}}``, as transformers and diffusers save."""

from __future__ import annotations

import json
from pathlib import Path

from regraft.adapter import MODEL
from regraft.checkpoints import Checkpoint, Reader
from regraft.errors import InputError, reading
from regraft.tensors import TensorRef, read_tensor_file


def _detect(path: Path) -> bool:
    return path.is_file() and path.name.endswith(".index.json")


def read_shards(index: Path) -> dict[str, TensorRef]:
    """Every tensor that the index names.

    Raises:
        InputError: the index is damaged, names a file outside of its folder, or a shard lacks a tensor.
    """
    with reading(index):
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if not isinstance(weight_map, dict):
        raise InputError("weight_map is no table", file=index)
    tensors: dict[str, TensorRef] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        file = index.parent / shard
        # An index from a stranger must not lead the reader to other places on the disk.
        if Path(shard).name != shard:
            raise InputError("names a shard outside of its folder", file=index, key=shard)
        content = read_tensor_file(file).tensors
        for name in (name for name, holder in weight_map.items() if holder == shard):
            if name not in content:
                raise InputError("the index names a tensor that is not in its shard", file=file, key=name)
            tensors[name] = content[name]
    return tensors


def _read(path: Path) -> Checkpoint:
    return Checkpoint({MODEL: read_shards(path)})


READER = Reader("shard index", 10, _detect, _read)
