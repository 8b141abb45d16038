"""What the schemes share: dequantised rows, unpacked integers, and errors that name the tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.tensors import Shape, TensorRef

# Values that are dequantised at once: what the integer indices on the way take stays small beside a tensor.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Dequantised(ABC):
    """A `TensorRef` to a weight that is computed from quantised ones, in float32.

    The tools themselves compute in half precision: theirs is this, rounded once.
    """

    shape: Shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @abstractmethod
    def reader(self) -> Callable[[range], Tensor]:
        """Reads what all rows need; the result gives rows of the weight, (rows, …), float32."""

    def load(self) -> Tensor:
        return self.rows([range(self.shape[0])])

    def rows(self, ranges: Sequence[range]) -> Tensor:
        inside = [range(self.shape[0])[part.start : part.stop] for part in ranges]
        out = torch.empty(sum(map(len, inside)), *self.shape[1:])
        read, place = self.reader(), 0
        step = max(1, _CHUNK // max(1, prod(self.shape[1:])))
        for part in inside:
            for start in range(part.start, part.stop, step):
                rows = range(start, min(start + step, part.stop))
                out[place : place + len(rows)] = read(rows).reshape(len(rows), *self.shape[1:])
                place += len(rows)
        return out


@dataclass(frozen=True)
class Found:
    """One quantised weight.

    Attributes:
        weight: the dequantised weight.
        used: suffixes of the stored tensors that belong to it (``.weight``, ``.weight.absmax``).
        kind: scheme and type, for people: ``bnb nf4``.
    """

    weight: TensorRef
    used: tuple[str, ...]
    kind: str


#: Module path, its stored tensors by suffix (``.qweight``), the config's ``quantization_config`` → the weight.
Read = Callable[[str, Mapping[str, TensorRef], Mapping[str, Any]], Found | None]


@dataclass(frozen=True)
class Scheme:
    """One way to quantise.

    Attributes:
        name: for messages.
        marks: suffix of a stored tensor that only this scheme has.
        read: the weight of a module, or None where it is of another scheme after all.
        markers: names (last part) of tensors that only say that the file is of this scheme.
    """

    name: str
    marks: tuple[str, ...]
    read: Read
    markers: tuple[str, ...] = ()


def file_of(ref: TensorRef) -> Path | None:
    """The file that a tensor lies in, for messages."""
    file = getattr(ref, "file", None)
    return file if isinstance(file, Path) else None


def odd(module: str, ref: TensorRef, what: str) -> InputError:
    """An error about a module whose quantised parts don't fit together, or are of an unknown layout."""
    return InputError(what, file=file_of(ref), key=module, remedy="Use the base in fp16 or bf16, or get a whole file.")


def need(module: str, parts: Mapping[str, TensorRef], suffix: str) -> TensorRef:
    """The part of that suffix.

    Raises:
        InputError: it is not there.
    """
    if suffix not in parts:
        raise odd(module, next(iter(parts.values())), f"is quantised, but {module}{suffix} is missing")
    return parts[suffix]


def unpack(packed: Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> Tensor:
    """Unsigned integers out of int32 words, several in each along ``dim``: the lowest bits first.

    Args:
        packed: int32, (a, b).
        bits: of one integer: 1, 2, 4 or 8.
        dim: 0: words hold values of one column, (a · 32 / bits, b); 1: of one row, (a, b · 32 / bits).
        order: which of a word's values stands at each place from the lowest bits on.
    """
    each = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    if order is not None:
        shifts = shifts[torch.tensor(order).argsort()]
    words, places = (packed[:, None, :], shifts[:, None]) if dim == 0 else (packed[:, :, None], shifts)
    values = torch.bitwise_and(torch.bitwise_right_shift(words, places), 2**bits - 1)
    rows, columns = packed.shape
    return values.reshape(rows * each, columns) if dim == 0 else values.reshape(rows, columns * each)


def groups_of(inputs: int, count: int, stored: TensorRef | None) -> Tensor:
    """The group of each input, (inputs,): as stored, or one group after the other.

    Raises:
        InputError: an input's group is none of the ``count``.
    """
    if stored is None:
        return torch.arange(inputs) // -(-inputs // count)
    groups = stored.load().long()
    if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise odd(str(getattr(stored, "name", "")), stored, f"names a group that is none of {count}")
    return groups
