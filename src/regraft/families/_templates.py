"""Names with number ranges: ``blocks.{0-39}.attn1.to_q.weight`` stands for forty names.

Neighbouring rows with one beginning count up together, block by block, so that the order is that of a state dict.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TypeVar

_RANGE = re.compile(r"\{(\d+)-(\d+)\}")
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)")

T = TypeVar("T")


def expand(
    rows: Iterable[tuple[str, T]], fill: Callable[[T, str], T] = lambda value, _: value
) -> Iterator[tuple[str, T]]:
    """Every name that the templates stand for, with its value.

    Args:
        rows: template and value.
        fill: puts a number in the first ``{}`` of a value; values are left alone by default.

    >>> dict(expand([("h.{0-1}.a", 1), ("h.{0-1}.b", 2)]))
    {'h.0.a': 1, 'h.0.b': 2, 'h.1.a': 1, 'h.1.b': 2}
    """
    for beginning, group in groupby(rows, _beginning):
        if not beginning:
            yield from group
            continue
        rest = [(template[len(beginning) :], value) for template, value in group]
        found = _RANGE.search(beginning)
        assert found is not None
        for number in range(int(found[1]), int(found[2]) + 1):
            here = f"{beginning[: found.start()]}{number}"
            for name, value in expand([(after, fill(value, str(number))) for after, value in rest], fill):
                yield here + name, value


def _beginning(row: tuple[str, T]) -> str:
    found = _RANGE.search(row[0])
    return row[0][: found.end()] if found else ""


def kind_of(name: str) -> str:
    """A name (or template) without its numbers: names of one kind differ by their blocks alone.

    >>> kind_of("blocks.{0-39}.attn1.to_out.0.weight")
    'blocks.#.attn1.to_out.#.weight'
    >>> kind_of("blocks_7_attn1_to_out_0")
    'blocks_#_attn1_to_out_#'
    """
    return _NUMBER.sub("#", _RANGE.sub("#", name))
