"""A sharded checkpoint: ``*.index.json`` with ``{"weight_map": {name: shard}}``, as transformers and diffusers save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.checkpoints import Checkpoint, Reader
from regraft.checkpoints._files import container, describe, kept_inside
from regraft.checkpoints.quantised import Plain, plain_weights
from regraft.checkpoints.single_file import split_components
from regraft.errors import InputError
from regraft.limits import check_names, read_json_object
from regraft.tensor_files import read_tensor_file
from regraft.tensors import TensorRef

_AGAIN = "Download or copy it again."


def _detect(path: Path) -> bool:
    return path.is_file() and path.name.endswith(".index.json")


def read_shards(index: Path) -> dict[str, TensorRef]:
    """Every tensor that the index names.

    Raises:
        InputError: the index is damaged, names a file outside of its folder, or a shard lacks a tensor.
    """
    return _tensors(index, _weight_map(index))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(kept_inside(index, index.parent)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError("is missing, or no table of names to files", file=index, key="weight_map", remedy=_AGAIN)
    check_names(weight_map, index)
    return {name: str(shard) for name, shard in weight_map.items()}


def _tensors(index: Path, weight_map: Mapping[str, str]) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    held: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        held.setdefault(shard, []).append(name)
    for shard in sorted(held):
        # An index from a stranger must not lead the reader to other places on the disk.
        if Path(shard).name != shard:
            raise InputError("names a shard outside of its folder", file=index, key=shard, remedy=_AGAIN)
        file = kept_inside(index.parent / shard, index.parent)
        content = read_tensor_file(file).tensors
        for name in held[shard]:
            if name not in content:
                what = "the index names a tensor that is not in its shard"
                raise InputError(what, file=file, key=name, remedy=_AGAIN)
            tensors[name] = content[name]
    return tensors


def read_plain_shards(index: Path, config: Mapping[str, Any] | None = None) -> tuple[Plain, str]:
    """Every tensor that the index names, with quantisation undone, and a description."""
    weight_map = _weight_map(index)
    plain = plain_weights(_tensors(index, weight_map), config)
    kinds = (container(Path(shard)) for shard in weight_map.values())
    return plain, describe(kinds, plain.kinds)


def _read(path: Path) -> Checkpoint:
    plain, description = read_plain_shards(path)
    components, left_out = split_components(plain.tensors)
    return Checkpoint(components, {}, description, plain.left_out + left_out)


READER = Reader("shard index", 10, _detect, _read)
