"""Tensors in a safetensors file on the hub: the header is read, the values when they are asked for."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.hub.ranges import RemoteFile, Span
from regraft.tensor_files import SAFETENSORS_DTYPES, TensorFile
from regraft.tensors import InBytes, Shape, TensorRef, n_bytes

_FIRST_READ, _LONGEST_HEADER = 1 << 17, 100_000_000

_ahead = threading.local()


@dataclass(frozen=True)
class RemoteTensor(InBytes):
    """A `TensorRef` into a `RemoteFile`.

    Attributes:
        offset: where its data begins in the file.
    """

    file: RemoteFile
    name: str
    shape: Shape
    dtype: torch.dtype
    offset: int = field(repr=False)

    def _read(self, parts: Sequence[Span]) -> Tensor:
        spans = [(self.offset + start, size) for start, size in parts]
        noted: dict[RemoteFile, list[Span]] | None = getattr(_ahead, "noted", None)
        if noted is not None:
            noted.setdefault(self.file, []).extend(spans)
            return torch.zeros(sum(size for _, size in parts), dtype=torch.uint8).view(self.dtype)
        data = bytearray().join(self.file.read(spans))
        whole = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return whole.view(self.dtype)


@contextmanager
def ahead() -> Iterator[None]:
    """Within, remote reads are only noted and give zeros; on leaving, all of them are fetched at once and kept."""
    noted: dict[RemoteFile, list[Span]] = {}
    _ahead.noted = noted
    try:
        yield
    finally:
        _ahead.noted = None
    for file, spans in noted.items():
        file.hold(spans)


def fetch_whole(refs: Iterable[TensorRef]) -> None:
    """Fetch the remote ones of these tensors whole, at once."""
    remote = [ref for ref in refs if is_remote(ref)]
    if len(remote) > 1:
        with ahead():
            for ref in remote:
                ref.load()


def is_remote(ref: TensorRef) -> bool:
    """Whether the values lie on the hub."""
    while hasattr(ref, "of"):
        ref = ref.of
    return isinstance(ref, RemoteTensor)


def read_remote_safetensors(file: RemoteFile) -> TensorFile:
    """Names, shapes, dtypes and metadata, from the file's header alone.

    Raises:
        InputError: the server refuses, or the header is not that of a sound safetensors file.
    """
    if file.size < 8:
        raise _damaged(file, "is truncated")
    first = file.read([(0, min(file.size, _FIRST_READ))])[0]
    length = int.from_bytes(first[:8], "little")
    if length > min(file.size - 8, _LONGEST_HEADER):
        raise _damaged(file, "is no safetensors file, or its header is damaged")
    text = first[8 : 8 + length]
    if len(text) < length:
        text += file.read([(8 + len(text), length - len(text))])[0]
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()):
            raise ValueError("metadata that is not text")
        tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(file, "has a damaged header") from None
    _check_layout(file, tensors.values(), 8 + length)
    return TensorFile(dict(tensors), metadata)


def _damaged(file: RemoteFile, what: str) -> InputError:
    return InputError(what, file=file.name, remedy="Ask its author for a sound one.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _tensor(file: RemoteFile, name: str, entry: dict[str, Any], data: int) -> RemoteTensor:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in [*shape, begin, end]):
        raise ValueError("sizes that are no natural numbers")
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None:
        remedy = "Save it as float32, float16 or bfloat16."
        raise InputError(f"dtype {entry['dtype']} is not supported", file=file.name, key=name, remedy=remedy)
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("a shape and a size that disagree")
    return RemoteTensor(file, name, tuple(shape), dtype, data + begin)


def _check_layout(file: RemoteFile, tensors: Iterable[RemoteTensor], data: int) -> None:
    """The data section must be covered by the tensors, without holes and without overlap."""
    at = data
    for offset, size in sorted((tensor.offset, n_bytes(tensor)) for tensor in tensors):
        if offset != at:
            raise _damaged(file, "has tensors that overlap or leave holes")
        at += size
    if at != file.size:
        raise _damaged(file, "has tensors that do not fill the file, or reach beyond it")
