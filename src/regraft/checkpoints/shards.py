"""A sharded checkpoint: ``*.index.json`` with ``{"weight_map": {name: shard}}``, as transformers and diffusers save."""

from __future__ import annotations

from pathlib import Path

from regraft.adapter import MODEL
from regraft.checkpoints import Checkpoint, Reader
from regraft.errors import InputError
from regraft.limits import check_names, read_json_object
from regraft.tensors import TensorRef, read_tensor_file

_AGAIN = "Download or copy it again."


def _detect(path: Path) -> bool:
    return path.is_file() and path.name.endswith(".index.json")


def read_shards(index: Path) -> dict[str, TensorRef]:
    """Every tensor that the index names.

    Raises:
        InputError: the index is damaged, names a file outside of its folder, or a shard lacks a tensor.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError("is missing, or no table of names to files", file=index, key="weight_map", remedy=_AGAIN)
    check_names(weight_map, index)
    tensors: dict[str, TensorRef] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        file = index.parent / shard
        # An index from a stranger must not lead the reader to other places on the disk.
        if Path(shard).name != shard:
            raise InputError("names a shard outside of its folder", file=index, key=shard, remedy=_AGAIN)
        content = read_tensor_file(file).tensors
        for name in (name for name, holder in weight_map.items() if holder == shard):
            if name not in content:
                what = "the index names a tensor that is not in its shard"
                raise InputError(what, file=file, key=name, remedy=_AGAIN)
            tensors[name] = content[name]
    return tensors


def _read(path: Path) -> Checkpoint:
    return Checkpoint({MODEL: read_shards(path)})


READER = Reader("shard index", 10, _detect, _read)
