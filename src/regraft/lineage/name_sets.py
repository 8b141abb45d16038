"""Sets of module names in a few words: ``blocks.{0-27}.attn.to_{q,k,v}``-like patterns, exact both ways.

A pattern is a dotted name whose parts may be ``{…}`` groups: items divided by commas, ``a-b`` an item that stands for
the whole numbers from a to b. The set is the product of all groups. The characters ``% { } ,`` inside of a name are
written ``%25 %7B %7D %2C``, and the hyphen of a part that would read as a range ``%2D``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import product
from math import prod

#: The most names that one document may stand for; no model comes near it.
MOST_NAMES = 200_000

_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,8})")
_CODES = {"%": "%25", "{": "%7B", "}": "%7D", ",": "%2C"}
_CODED = re.compile("|".join([*_CODES.values(), "%2D"]))
_PLAIN = {code: char for char, code in _CODES.items()} | {"%2D": "-"}

# One part of a name as the items that may stand there, sorted.
_Box = tuple[tuple[str, ...], ...]


def compact(names: Iterable[str]) -> list[str]:
    """Patterns for exactly these names; the same set gives the same patterns, in whatever order it comes.

    >>> compact(["layers.0.q", "layers.1.q", "layers.0.v", "layers.1.v", "head"])
    ['head', 'layers.{0-1}.{q,v}']
    """
    by_length: dict[int, list[_Box]] = {}
    for name in sorted(set(names)):
        parts = name.split(".")
        by_length.setdefault(len(parts), []).append(tuple((_coded(part),) for part in parts))
    boxes: list[_Box] = []
    for length, group in by_length.items():
        # Two boxes that differ at one place alone are one box: the last places first, since roles repeat in blocks.
        for place in reversed(range(length)):
            merged: dict[_Box, set[str]] = {}
            for box in group:
                merged.setdefault(box[:place] + box[place + 1 :], set()).update(box[place])
            group = [
                (*rest[:place], tuple(sorted(items, key=_natural)), *rest[place:]) for rest, items in merged.items()
            ]
        boxes += group
    return sorted(".".join(_written(items) for items in box) for box in boxes)


def expand(patterns: Iterable[str], *, most: int = MOST_NAMES) -> list[str]:
    """The names that the patterns stand for, in order.

    Raises:
        ValueError: a pattern is malformed, or they stand for more than ``most`` names.

    >>> expand(["layers.{0-1}.{q,v}"])
    ['layers.0.q', 'layers.0.v', 'layers.1.q', 'layers.1.v']
    """
    parsed = [_parsed(pattern) for pattern in patterns]
    # Counted before a range is written out: {0-999999999} is nine characters.
    if sum(prod(_size(group) for group in groups) for _, groups in parsed) > most:
        raise ValueError(f"the patterns stand for more than {most} names")
    names = []
    for texts, groups in parsed:
        for choice in product(*(_items(group) for group in groups)):
            chosen = (*choice, "")
            names.append(_decoded("".join(text + item for text, item in zip(texts, chosen, strict=True))))
    return names


def _parsed(pattern: str) -> tuple[Sequence[str], Sequence[list[str]]]:
    """The texts around the groups, and the items of each group."""
    pieces = _GROUP.split(pattern)
    texts, groups = pieces[::2], [piece.split(",") for piece in pieces[1::2]]
    if any("{" in text or "}" in text for text in texts) or not all(item for group in groups for item in group):
        raise ValueError(f"no pattern of names: {pattern[:80]!r}")
    for group in groups:
        for item in group:
            bounds = _RANGE.fullmatch(item)
            if bounds and int(bounds[1]) > int(bounds[2]):
                raise ValueError(f"a range that runs backwards: {item}")
    return texts, groups


def _size(group: Iterable[str]) -> int:
    bounds = [_RANGE.fullmatch(item) for item in group]
    return sum(1 if found is None else int(found[2]) - int(found[1]) + 1 for found in bounds)


def _items(group: Iterable[str]) -> list[str]:
    items: list[str] = []
    for item in group:
        bounds = _RANGE.fullmatch(item)
        items += [str(i) for i in range(int(bounds[1]), int(bounds[2]) + 1)] if bounds else [item]
    return items


def _written(items: Sequence[str]) -> str:
    if len(items) == 1:
        return items[0]
    parts: list[str] = []
    run: list[int] = []
    for item in [*items, ""]:
        number = int(item) if _is_number(item) else None
        if number is not None and run and number == run[-1] + 1:
            run.append(number)
            continue
        if run:
            parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
        run = [number] if number is not None else []
        if number is None and item:
            parts.append(item)
    return "{" + ",".join(parts) + "}"


def _natural(item: str) -> tuple[int, int, str]:
    return (0, int(item), "") if _is_number(item) else (1, 0, item)


def _is_number(item: str) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]{0,8}", item) is not None


def _coded(part: str) -> str:
    text = "".join(_CODES.get(char, char) for char in part)
    return text.replace("-", "%2D") if _RANGE.fullmatch(text) else text


def _decoded(name: str) -> str:
    return _CODED.sub(lambda found: _PLAIN[found[0]], name)
