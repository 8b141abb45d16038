"""Maps of a fit that are more than memory should hold: they wait on the disk, in a file without a name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from threading import Lock
from typing import Any, BinaryIO

import torch
from torch import Tensor

from regraft.errors import OutputError, first_line
from regraft.tensors import Shape
from regraft.transport import Deferred, LinearMap, Terms, Transport

#: Bytes of maps that a fit keeps in memory.
MOST_HELD = 256 << 20

_Read = Callable[[], Tensor]


class Spill:
    """Takes the transports of one fit, the first of them as they are."""

    def __init__(self) -> None:
        """Nothing is written yet."""
        self._held = 0
        self._file: BinaryIO | None = None
        self._lock = Lock()

    def __call__(self, transport: Transport) -> Transport:
        """The transport, or one that reads its maps, float32 on the CPU, from the file whenever it is asked for them.

        Args:
            transport: its maps in memory, on any device.

        Raises:
            OutputError: there is no room on the disk.
        """
        parts = [part for term in transport.terms for map_ in term for part in _parts(map_) if part is not None]
        wanted = {_key(part): _lying(part) for part in parts}
        size = sum(tensor.nbytes for tensor in wanted.values())
        with self._lock:
            if self._held + size <= MOST_HELD:
                self._held += size
                return transport
            readers = {key: self._written(tensor) for key, tensor in wanted.items()}
        terms = tuple((_waiting(left, readers), _waiting(right, readers)) for left, right in transport.terms)
        return Spilled(terms, transport.rotates)

    def _written(self, tensor: Tensor) -> _Read:
        tensor = tensor.detach().to("cpu", torch.float32).contiguous()
        try:
            if self._file is None:
                # Open for as long as a transport is there that reads from it.
                self._file = tempfile.TemporaryFile(prefix="regraft-")  # noqa: SIM115
            start = self._file.seek(0, 2)
            self._file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        except OSError as error:
            raise OutputError(
                f"the maps of this fit can't be written to it ({error.strerror or first_line(error)})",
                file=tempfile.gettempdir(),
                remedy="Make room there, or set TMPDIR to a folder on another disk.",
            ) from None
        return partial(self._read, start, tuple(tensor.shape))

    def _read(self, start: int, shape: Shape) -> Tensor:
        assert self._file is not None
        found = torch.empty(prod(shape), dtype=torch.float32)
        with self._lock:
            self._file.seek(start)
            self._file.readinto(memoryview(found.view(torch.uint8).numpy()))  # type: ignore[arg-type, attr-defined]
        return found.reshape(shape)


class Spilled(Deferred):
    """A transport whose maps lie in a `Spill`'s file."""

    def __init__(self, waiting: Sequence[tuple[_WaitingMap, _WaitingMap]], rotates: bool) -> None:
        super().__init__(rotates)
        object.__setattr__(self, "waiting", waiting)

    waiting: Sequence[tuple[_WaitingMap, _WaitingMap]]

    @property
    def terms(self) -> Terms:
        read: dict[_Read, Tensor] = {}
        return tuple((left.read(read), right.read(read)) for left, right in self.waiting)

    def to_cpu(self, seen: dict[int, Tensor]) -> Transport:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process has no such file.
        return Transport, (self.terms, self.rotates)


@dataclass(frozen=True)
class _WaitingMap:
    """A `LinearMap`; of each tensor what reads it, and whether it is the transpose of what is read."""

    identity: float
    parts: Sequence[tuple[_Read, bool] | None]

    def read(self, known: dict[_Read, Tensor]) -> LinearMap:
        found: list[Tensor | None] = []
        for part in self.parts:
            if part is None:
                found.append(None)
                continue
            reader, turned = part
            tensor = known.get(reader)
            if tensor is None:
                tensor = known[reader] = reader()
            found.append(tensor.T if turned else tensor)
        return LinearMap(self.identity, *found)


def _parts(map_: LinearMap) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return map_.left, map_.right, map_.diagonal


def _is_turned(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_contiguous()


def _lying(tensor: Tensor) -> Tensor:
    """As it lies in memory: of a projection U Uᵀ the second factor is the first."""
    return tensor.T if _is_turned(tensor) else tensor


def _key(tensor: Tensor) -> tuple[int, Shape]:
    return tensor.data_ptr(), tuple(_lying(tensor).shape)


def _waiting(map_: LinearMap, readers: Mapping[tuple[int, Shape], _Read]) -> _WaitingMap:
    return _WaitingMap(
        map_.identity, [None if part is None else (readers[_key(part)], _is_turned(part)) for part in _parts(map_)]
    )
