"""What earlier runs have made, as workers are told: to each row what lies in its place, and all keys in short."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    """What an earlier run has made of an adapter.

    Attributes:
        key: see `regraft.batch.work.key_of`.
        stem: name of its outputs without suffix.
        outputs: their names in the output folder.
        hashes: of their bytes.
        lost: it is not known after all.
    """

    key: str
    stem: str = ""
    outputs: tuple[str, ...] = ()
    hashes: tuple[str, ...] = ()
    lost: bool = False


class Keys:
    """The beginnings of many keys in order, eight bytes each: a worker holds a million of them in eight megabytes."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Of keys as `regraft.batch.work.key_of` makes them."""
        self._beginnings = array("Q", sorted(map(_beginning, keys)))

    def __contains__(self, key: str) -> bool:
        """Whether it may be one of them; what is none is nearly always known for none."""
        wanted = _beginning(key)
        place = bisect_left(self._beginnings, wanted)
        return place < len(self._beginnings) and self._beginnings[place] == wanted


def _beginning(key: str) -> int:
    return int(key[:16], 16)
