"""Maps of a fit that are more than memory should hold: they wait on the disk, in a file without a name."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from regraft.errors import OutputError, first_line
from regraft.tensors import Shape
from regraft.transport import Deferred, LinearMap, Terms, Transport
from regraft.waiting import Place, WaitingTensors

#: Bytes of maps that a fit keeps in memory.
MOST_HELD = 256 << 20


class Spill:
    """Takes the transports of one fit, the first of them as they are."""

    def __init__(self) -> None:
        """Nothing is written yet."""
        self._held = 0
        self._tensors: WaitingTensors | None = None
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
            if self._tensors is None:
                # Open for as long as a transport is there that reads from it.
                file = tempfile.TemporaryFile(prefix="regraft-", buffering=0)  # noqa: SIM115
                self._tensors = WaitingTensors(cast("BinaryIO", file))
        places = {key: self._written(self._tensors, tensor) for key, tensor in wanted.items()}
        terms = tuple((_waiting(left, places), _waiting(right, places)) for left, right in transport.terms)
        return Spilled(self._tensors, terms, transport.rotates)

    def _written(self, tensors: WaitingTensors, tensor: Tensor) -> Place:
        try:
            return tensors.add(tensor.detach().to("cpu", torch.float32).contiguous())
        except OSError as error:
            raise OutputError(
                f"the maps of this fit can't be written to it ({error.strerror or first_line(error)})",
                file=tempfile.gettempdir(),
                remedy="Make room there, or set TMPDIR to a folder on another disk.",
            ) from None


class Spilled(Deferred):
    """A transport whose maps lie in a `Spill`'s file."""

    def __init__(
        self, tensors: WaitingTensors, waiting: Sequence[tuple[_WaitingMap, _WaitingMap]], rotates: bool
    ) -> None:
        super().__init__(rotates)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "waiting", waiting)

    tensors: WaitingTensors
    waiting: Sequence[tuple[_WaitingMap, _WaitingMap]]

    @property
    def terms(self) -> Terms:
        read: dict[Place, Tensor] = {}
        return tuple((left.read(self.tensors, read), right.read(self.tensors, read)) for left, right in self.waiting)

    def to_cpu(self, seen: dict[int, Tensor]) -> Transport:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process has no such file.
        return Transport, (self.terms, self.rotates)


@dataclass(frozen=True)
class _WaitingMap:
    """A `LinearMap`; of each tensor where it lies, and whether it is the transpose of what lies there."""

    identity: float
    parts: Sequence[tuple[Place, bool] | None]

    def read(self, tensors: WaitingTensors, known: dict[Place, Tensor]) -> LinearMap:
        found: list[Tensor | None] = []
        for part in self.parts:
            if part is None:
                found.append(None)
                continue
            place, turned = part
            tensor = known.get(place)
            if tensor is None:
                tensor = known[place] = tensors.read(place)
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


def _waiting(map_: LinearMap, places: Mapping[tuple[int, Shape], Place]) -> _WaitingMap:
    return _WaitingMap(
        map_.identity, [None if part is None else (places[_key(part)], _is_turned(part)) for part in _parts(map_)]
    )
