"""The GGUF container, versions 2 and 3: header and lazily dequantised tensors.

Layout: ggml's docs/gguf.md. The header is parsed here, since gguf's own `GGUFReader` trusts the counts that a file
states, and makes an array for each token of a vocabulary; the block formats and their sizes are the gguf package's.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch
from torch import Tensor

from regraft.errors import InputError, RegraftError, reading
from regraft.limits import check_file
from regraft.tensors import FileStamp, Shape, Stored, read_rows

MAGIC = b"GGUF"
_TRUNCATED = "is truncated, or its header is damaged"
_AGAIN = "Download or copy it again."
# Value types by their number: how `struct` names the fixed ones.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Longer arrays are vocabularies: passed over.
_LONGEST_KEPT = 4096
# ggml itself allows 4 dimensions and names of 64 bytes.
_MOST_DIMENSIONS, _LONGEST_NAME = 8, 1024
_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
# Bytes of quantised data that are turned to floats at once.
_CHUNK = 1 << 20


def gguf_package() -> ModuleType:
    """The gguf package, which knows the block formats.

    Raises:
        RegraftError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise RegraftError(
            "reading GGUF needs the gguf package",
            remedy="Install it: pip install 'regraft[gguf]', or pip install gguf.",
        ) from None
    return gguf


@dataclass(frozen=True)
class GgufTensor:
    """A `TensorRef` into a GGUF file; quantised ones come out in float32.

    Attributes:
        raw: the stored bytes, (rows, bytes of a row), where a row is one of the last dimension.
        kind: ggml's name of the type: ``F16``, ``Q4_1``, …
    """

    raw: Stored
    shape: Shape
    kind: str

    @property
    def dtype(self) -> torch.dtype:
        return _PLAIN.get(self.kind, torch.float32)

    def load(self) -> Tensor:
        return self._values(range(self.raw.shape[0])).reshape(self.shape)

    def rows(self, ranges: Sequence[range]) -> Tensor:
        if len(self.shape) < 2:
            whole = self.load()
            return torch.cat([whole[part.start : part.stop] for part in ranges])
        each = prod(self.shape[1:-1])
        inside = [range(self.shape[0])[part.start : part.stop] for part in ranges]
        values = [self._values(range(part.start * each, part.stop * each)) for part in inside]
        return torch.cat(values).reshape(sum(map(len, inside)), *self.shape[1:])

    def _values(self, rows: range) -> Tensor:
        """Rows of the last dimension, (rows, columns)."""
        if not self.raw.shape[1]:
            return torch.empty(len(rows), 0, dtype=self.dtype)
        if self.kind in _PLAIN:
            return self.raw.rows([rows]).view(self.dtype)
        gguf = gguf_package()
        kind = gguf.GGMLQuantizationType[self.kind]
        out = torch.empty(len(rows), self.shape[-1] if self.shape else 1)
        if not out.numel():
            return out
        step = max(1, _CHUNK // max(1, self.raw.shape[1]))
        for start in range(rows.start, rows.stop, step):
            part = range(start, min(start + step, rows.stop))
            data = read_rows(self.raw, [part]).numpy()
            try:
                values = gguf.quants.dequantize(data, kind)
            except NotImplementedError:
                raise InputError(
                    f"type {self.kind} can't be dequantised by gguf", file=self.raw.file, key=self.raw.name
                ) from None
            out[part.start - rows.start : part.stop - rows.start] = torch.from_numpy(values)
        return out


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's tensors by their stored names, and its key-value pairs (long arrays left out)."""

    tensors: Mapping[str, GgufTensor]
    fields: Mapping[str, Any] = field(default_factory=dict)


class _Header:
    """Reads numbers and strings one after the other, never beyond the end of the file."""

    def __init__(self, stream: IO[bytes], path: Path, size: int) -> None:
        self.stream, self.path, self.size = stream, path, size

    def error(self, what: str = _TRUNCATED, key: str | None = None) -> InputError:
        return InputError(what, file=self.path, key=key, remedy=_AGAIN)

    def _left(self) -> int:
        return self.size - self.stream.tell()

    def take(self, count: int) -> bytes:
        if count > self._left():
            raise self.error()
        return self.stream.read(count)

    def skip(self, count: int) -> None:
        if count > self._left():
            raise self.error()
        self.stream.seek(count, 1)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, each: int) -> int:
        """A stated number of things of at least ``each`` bytes, which must be there."""
        stated = int(self.number("Q"))
        if stated * each > self._left():
            raise self.error()
        return stated

    def text(self) -> str:
        try:
            return self.take(self.count(1)).decode()
        except UnicodeDecodeError:
            raise self.error("has text that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            # A vocabulary may hold broken characters; only keys must be sound.
            return self.take(self.count(1)).decode(errors="replace")
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self.error(f"has a value of unknown type {kind}")
        return self.number(_SCALARS[kind])

    def _array(self) -> list[Any] | None:
        kind = self.number("I")
        if kind == _STRING:
            count = self.count(8)
            kept = [self.value(kind) for _ in range(min(count, _LONGEST_KEPT))]
            for _ in range(count - len(kept)):
                self.skip(self.count(1))
            return kept if count == len(kept) else None
        if kind not in _SCALARS:
            raise self.error(f"has an array of type {kind}")
        width = struct.calcsize(f"<{_SCALARS[kind]}")
        count = self.count(width)
        if count > _LONGEST_KEPT:
            self.skip(count * width)
            return None
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * width)))


def read_gguf(path: Path) -> GgufFile:
    """Names, shapes, types and key-value pairs of a GGUF file, from its header alone.

    Raises:
        InputError: the file is missing, truncated, damaged or no GGUF file.
        RegraftError: the gguf package is missing.
    """
    gguf = gguf_package()
    check_file(path)
    with reading(path), path.open("rb") as stream:
        stamp = FileStamp.of(stream)
        header = _Header(stream, path, stamp.size)
        if header.take(4) != MAGIC:
            raise InputError("is no GGUF file (wrong magic)", file=path, remedy=_AGAIN)
        version = header.number("I")
        if version not in (2, 3):
            what = "is big-endian" if version and version % 65536 == 0 else f"is GGUF version {version}"
            raise InputError(f"{what}, which can't be read", file=path, remedy="Convert it with llama.cpp's tools.")
        # A tensor takes 24 bytes of header at least, a pair 13.
        n_tensors, n_pairs = header.count(24), header.count(13)
        pairs: dict[str, Any] = {}
        for _ in range(n_pairs):
            key = header.text()
            pairs[key] = header.value(header.number("I"))
        infos = [_info(header) for _ in range(n_tensors)]
        align = pairs.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise header.error("states an alignment that is no power of two", "general.alignment")
        start = -(-stream.tell() // align) * align
    tensors: dict[str, GgufTensor] = {}
    for name, dims, number, offset in infos:
        if name in tensors:
            raise InputError("is there twice", file=path, key=name, remedy=_AGAIN)
        kind, rows, width = _layout(gguf, path, name, dims, number)
        if start + offset + rows * width > stamp.size:
            raise InputError("lies outside of the file: it is truncated", file=path, key=name, remedy=_AGAIN)
        raw = Stored(path, name, (rows, width), torch.uint8, start + offset, stamp)
        tensors[name] = GgufTensor(raw, tuple(reversed(dims)), kind)
    if sum(prod(tensor.raw.shape) for tensor in tensors.values()) > stamp.size:
        raise InputError("has tensors that lie in the same bytes", file=path, remedy=_AGAIN)
    return GgufFile(tensors, pairs)


def _info(header: _Header) -> tuple[str, list[int], int, int]:
    name = header.text()
    n_dims = header.number("I")
    if len(name) > _LONGEST_NAME or n_dims > _MOST_DIMENSIONS:
        raise header.error(
            f"has a tensor of {n_dims} dimensions" if n_dims > _MOST_DIMENSIONS else _TRUNCATED, name[:64]
        )
    dims = [int(header.number("Q")) for _ in range(n_dims)]
    # No type takes less than a bit for a value.
    if any(dim > 8 * header.size for dim in dims):
        raise header.error(f"states a size of {max(dims)}", name)
    return name, dims, header.number("I"), header.number("Q")


def _layout(gguf: ModuleType, path: Path, name: str, dims: list[int], number: int) -> tuple[str, int, int]:
    """Type, number of rows and bytes of a row. ``dims`` are ggml's: the fastest first."""
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise InputError(
            f"type {number} is not known to the gguf package",
            file=path,
            key=name,
            remedy="Update it: pip install -U gguf.",
        ) from None
    columns = dims[0] if dims else 1
    if columns % block:
        raise InputError(f"{columns} columns are no whole blocks of {block}", file=path, key=name, remedy=_AGAIN)
    return kind.name, prod(dims[1:]), columns // block * size
