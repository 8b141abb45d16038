"""Tensors that wait on the disk: one behind the other in an open file, and read back by their places."""

from __future__ import annotations

from math import prod
from threading import Lock
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from regraft.tensors import Shape, raw


class Place(NamedTuple):
    """Where a tensor lies in the file, and what it is."""

    dtype: torch.dtype
    shape: Shape
    start: int


class WaitingTensors:
    """A file of tensors, for several threads.

    Args:
        file: open for reading and writing, not buffered: so that a full disk is told of by whoever fills it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._lock, self._end = file, Lock(), 0

    def add(self, tensor: Tensor) -> Place:
        """Put a tensor behind the others.

        Args:
            tensor: on the CPU, contiguous.

        Raises:
            OSError: the disk is full.
        """
        rest = raw(tensor)
        with self._lock:
            place = Place(tensor.dtype, tuple(tensor.shape), self._end)
            self._file.seek(self._end)
            self._end += len(rest)
            while len(rest):
                rest = rest[self._file.write(rest) :]
        return place

    def read(self, place: Place) -> Tensor:
        """A tensor of its own.

        Raises:
            OSError: it can't be read.
        """
        found = torch.empty(prod(place.shape), dtype=place.dtype)
        rest = raw(found)
        with self._lock:
            self._file.seek(place.start)
            while len(rest):
                count = self._file.readinto(rest)  # type: ignore[attr-defined]
                if not count:
                    raise OSError("the file has become shorter")
                rest = rest[count:]
        return found.reshape(place.shape)
