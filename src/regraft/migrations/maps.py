"""The maps of a migration file, read when a transport is used: what is in memory does not grow with the migration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from regraft.errors import InputError
from regraft.migration import Entry, Migration
from regraft.migrations.model import Map
from regraft.tensors import TensorRef, all_finite
from regraft.transport import IDENTITY, Deferred, LinearMap, Terms, Transport

#: Most bytes of shared maps that one file's reader keeps for the modules that follow.
MOST_HELD = 256 << 20

_Pairs = Sequence[Sequence[int]]


class FileMaps:
    """The maps of one file, whose header has been checked.

    A tensor that several modules name is kept for the next of them, the latest used first and `MOST_HELD` bytes in
    all; any other is read anew at each use.

    Args:
        path: the file.
        maps: as the header lists them.
        tensors: of the file.
        terms: of every row, pairs of indices into ``maps``.
    """

    def __init__(
        self, path: Path, maps: Sequence[Map], tensors: Mapping[str, TensorRef], terms: Iterable[_Pairs]
    ) -> None:
        self.path, self.maps, self.tensors = path, maps, tensors
        uses = Counter(stem for pairs in terms for stem in {s for pair in pairs for i in pair for s in _stems(maps[i])})
        self._shared = {stem for stem, count in uses.items() if count > 1}
        self._held: dict[str, Tensor] = {}
        self._lock = Lock()

    def has_tensors(self, index: int) -> bool:
        """Whether a map is more than a multiple of the identity; told without reading it."""
        return bool(_stems(self.maps[index]))

    def terms(self, pairs: _Pairs, held: dict[str, Tensor] | None = None) -> Terms:
        """The maps of one row.

        Args:
            pairs: of indices into the file's maps.
            held: tensors by name, which are not read again and to which those are added that are read; by default
                those of this row alone.

        Raises:
            InputError: the file has changed or can't be read, or a tensor holds NaN or Inf.
        """
        loaded: dict[str, Tensor] = {} if held is None else held
        return tuple((self._map(left, loaded), self._map(right, loaded)) for left, right in pairs)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name, or the transpose that ``.T`` behind it asks for.

        Raises:
            InputError: the file has changed or can't be read, or the tensor holds NaN or Inf.
        """
        return self._tensor(name, {})

    def _map(self, index: int, loaded: dict[str, Tensor]) -> LinearMap:
        map_ = self.maps[index]
        if map_.identity == 1.0 and not self.has_tensors(index):
            return IDENTITY
        left, right, diagonal = (
            None if name is None else self._tensor(name, loaded) for name in (map_.left, map_.right, map_.diagonal)
        )
        return LinearMap(map_.identity, left, right, diagonal)

    def _tensor(self, name: str, loaded: dict[str, Tensor]) -> Tensor:
        stem = name.removesuffix(".T")
        if stem not in loaded:
            loaded[stem] = self._kept(stem) if stem in self._shared else self._read(stem)
        return loaded[stem].T if name.endswith(".T") else loaded[stem]

    def _kept(self, stem: str) -> Tensor:
        with self._lock:
            tensor = self._held.pop(stem, None)
            if tensor is None:
                tensor = self._read(stem)
            # Behind all others: what was used longest ago goes first.
            self._held[stem] = tensor
            size = sum(held.nbytes for held in self._held.values())
            while size > MOST_HELD:
                size -= self._held.pop(next(iter(self._held))).nbytes
        return tensor

    def _read(self, stem: str) -> Tensor:
        tensor = self.tensors[stem].load()
        if not all_finite(tensor):
            raise InputError("holds NaN or Inf", file=self.path, key=stem, remedy="It is damaged: get it again.")
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        # Another process reads the file for itself.
        return {**self.__dict__, "_held": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())


class FromFile(Deferred):
    """A transport whose maps lie in a file.

    Args:
        maps: of the file.
        pairs: indices of the maps of each term.
        rotates: see `Transport`.
    """

    def __init__(self, maps: FileMaps, pairs: _Pairs, rotates: bool) -> None:
        super().__init__(rotates)
        object.__setattr__(self, "maps", maps)
        object.__setattr__(self, "pairs", pairs)

    maps: FileMaps
    pairs: _Pairs

    @property
    def terms(self) -> Terms:
        return self.maps.terms(self.pairs)


def in_memory(migration: Migration) -> Migration:
    """The same migration with every map of a file in memory, those that modules share once.

    Raises:
        InputError: the file has changed or can't be read, or a map holds NaN or Inf.
    """
    held: dict[int, dict[str, Tensor]] = {}

    def of(entry: Entry) -> Entry:
        transport = entry.transport
        if not isinstance(transport, FromFile):
            return entry
        terms = transport.maps.terms(transport.pairs, held.setdefault(id(transport.maps), {}))
        return replace(entry, transport=Transport(terms, transport.rotates))

    return replace(migration, entries={module: of(entry) for module, entry in migration.entries.items()})


def _stems(map_: Map) -> set[str]:
    """Names of the tensors that a map is made of."""
    return {name.removesuffix(".T") for name in (map_.left, map_.right, map_.diagonal) if name is not None}
