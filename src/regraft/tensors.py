"""Tensors by reference: name, shape and dtype from a header, the values only when asked for."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import RawIOBase
from math import isfinite, prod
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

import torch
from torch import Tensor

from regraft.errors import InputError, reading

Shape = tuple[int, ...]


class TensorRef(Protocol):
    """A tensor that may still lie on disk."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def load(self) -> Tensor:
        """The tensor itself, in its stored dtype, on the CPU."""
        ...


@runtime_checkable
class ByRows(Protocol):
    """A `TensorRef` that can read some of its rows without the rest."""

    def rows(self, ranges: Sequence[range]) -> Tensor:
        """Ranges of rows of dimension 0, one below the other; what lies beyond the last row is left out."""
        ...


@runtime_checkable
class ByElements(Protocol):
    """A `TensorRef` that can read some of its elements without the rest."""

    def elements(self, runs: Sequence[range]) -> Tensor:
        """Runs of elements in the order of the flattened tensor, one after the other."""
        ...


@runtime_checkable
class Announced(Protocol):
    """A `TensorRef` whose bytes can be asked for before they are needed."""

    def announce(self) -> None:
        """Have the system read them while something else is computed; returns at once."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A `TensorRef` for a tensor that is already here."""

    tensor: Tensor = field(repr=False)

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def load(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class FileStamp:
    """What a file is known again by: offsets out of one header must not be used on another file of its name."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, stream: IO[bytes] | RawIOBase) -> FileStamp:
        status = os.fstat(stream.fileno())
        return cls(status.st_size, status.st_mtime_ns)


class InBytes(ABC):
    """A `TensorRef` to a run of bytes somewhere, of which any part can be read."""

    shape: Shape
    dtype: torch.dtype

    @abstractmethod
    def _read(self, parts: Sequence[tuple[int, int]]) -> Tensor:
        """Bytes of the tensor's data by (start, size), one after the other, as one row of its dtype."""

    def load(self) -> Tensor:
        return self._read([(0, n_bytes(self))]).reshape(self.shape)

    def rows(self, ranges: Sequence[range]) -> Tensor:
        """See `ByRows`."""
        row = n_bytes(self) // max(1, self.shape[0])
        inside = [range(self.shape[0])[part.start : part.stop] for part in ranges]
        data = self._read([(part.start * row, len(part) * row) for part in inside])
        return data.reshape(sum(map(len, inside)), *self.shape[1:])

    def elements(self, runs: Sequence[range]) -> Tensor:
        """See `ByElements`."""
        return self._read([(run.start * self.dtype.itemsize, len(run) * self.dtype.itemsize) for run in runs])


@dataclass(frozen=True)
class Stored(InBytes):
    """A `TensorRef` into a safetensors file.

    The bytes are read at their offset: opening the file anew with ``safe_open`` would parse the whole header for
    every tensor, and holding one handle would count every page that was ever read as this process's memory.
    """

    file: Path
    name: str
    shape: Shape
    dtype: torch.dtype
    offset: int = field(repr=False)
    stamp: FileStamp = field(repr=False)

    def announce(self) -> None:
        """See `Announced`; does nothing where the system has no such call (macOS, Windows)."""
        if hasattr(os, "posix_fadvise"):
            # A file that can't be opened says so when it is read.
            with suppress(OSError), self.file.open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), self.offset, n_bytes(self), os.POSIX_FADV_WILLNEED)

    def _read(self, parts: Sequence[tuple[int, int]]) -> Tensor:
        """Bytes of the tensor's data by (start, size), one after the other."""
        data = torch.empty(sum(size for _, size in parts), dtype=torch.uint8)
        left = memoryview(data.numpy())  # type: ignore[arg-type]
        with reading(self.file, self.name), self.file.open("rb", buffering=0) as stream:
            if FileStamp.of(stream) != self.stamp:
                raise InputError("has changed since it was opened", file=self.file, remedy="Run it again.")
            for start, size in parts:
                stream.seek(self.offset + start)
                _fill(left[:size], stream)
                left = left[size:]
        return data.view(self.dtype)


def _fill(buffer: memoryview, stream: RawIOBase) -> None:
    # One call reads 2 GiB at most.
    while buffer:
        got = stream.readinto(buffer)
        if not got:
            raise EOFError("the file ends within this tensor")
        buffer = buffer[got:]


def read_rows(ref: TensorRef, ranges: Sequence[range]) -> Tensor:
    """Ranges of rows of dimension 0, without the rest where ``ref`` can do that."""
    if isinstance(ref, ByRows):
        return ref.rows(ranges)
    whole = ref.load()
    return torch.cat([whole[part.start : part.stop] for part in ranges])


def read_elements(ref: TensorRef, runs: Sequence[range]) -> Tensor:
    """Runs of elements of the flattened tensor, one after the other, without the rest where ``ref`` can do that."""
    if isinstance(ref, ByElements):
        return ref.elements(runs)
    if isinstance(ref, ByRows) and ref.shape:
        width = prod(ref.shape[1:])
        return torch.cat([_within_rows(ref, run, width) for run in runs])
    whole = ref.load().reshape(-1)
    return torch.cat([whole[run.start : run.stop] for run in runs])


def _within_rows(ref: ByRows, run: range, width: int) -> Tensor:
    first = run.start // width
    rows = ref.rows([range(first, (run.stop - 1) // width + 1)]).reshape(-1)
    return rows[run.start - first * width :][: len(run)]


def announce(ref: TensorRef) -> None:
    """Have a tensor's bytes read ahead, where ``ref`` can do that."""
    if isinstance(ref, Announced):
        ref.announce()


@dataclass(frozen=True)
class Transposed:
    """A `TensorRef` to the transpose of a matrix."""

    of: TensorRef

    @property
    def shape(self) -> Shape:
        return tuple(reversed(self.of.shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def load(self) -> Tensor:
        return self.of.load().T.contiguous()


def n_bytes(ref: TensorRef) -> int:
    """Size of the tensor's data in bytes."""
    return prod(ref.shape) * ref.dtype.itemsize


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # The extremes carry NaN and Inf on, at a twentieth of what torch.isfinite takes of halves. Neither knows 8 bits.
    known = tensor.float() if tensor.itemsize == 1 else tensor
    low, high = torch.aminmax(known)
    return isfinite(float(low)) and isfinite(float(high))


def check_finite(tensor: Tensor, file: str | Path | None, key: str) -> Tensor:
    """``tensor`` itself, or an `InputError` where it holds NaN or Inf."""
    if not all_finite(tensor):
        raise InputError(
            "holds NaN or Inf",
            file=file,
            key=key,
            remedy="The file is damaged, or its training diverged: get another one.",
        )
    return tensor
