"""Rows of names packed into templates with number ranges: the inverse of ``regraft.families._templates.expand``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

Row = tuple[list[str], Any]


def compact(rows: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Template → value, in order. Values that are names (or map names) take ``{}`` where the number was."""
    return {".".join(parts): value for parts, value in _pack([(name.split("."), value) for name, value in rows])}


def _pack(rows: list[Row]) -> list[Row]:
    packed: list[Row] = []
    groups = [(head, list(members)) for head, members in groupby(rows, lambda row: row[0][:1])]
    at = 0
    while at < len(groups):
        head, members = groups[at]
        inner = [(parts[1:], value) for parts, value in members]
        end = at + 1
        if not head:
            packed += members
            at = end
            continue
        if head[0].isdigit():
            first = int(head[0])
            merged: list[Row] | None = None
            while end < len(groups) and groups[end][0] == [str(first + end - at)]:
                other = [(parts[1:], value) for parts, value in groups[end][1]]
                together = _merge(inner, first, other, first + end - at)
                if together is None or (merged is not None and merged != together):
                    break
                merged = together
                end += 1
            if merged is not None:
                head, inner = [f"{{{first}-{first + end - at - 1}}}"], merged
        packed += [(head + rest, value) for rest, value in _pack(inner)]
        at = end
    return packed


def _merge(one: list[Row], number: int, two: list[Row], other: int) -> list[Row] | None:
    if [parts for parts, _ in one] != [parts for parts, _ in two]:
        return None
    merged = [(parts, _same(a, number, b, other)) for (parts, a), (_, b) in zip(one, two, strict=True)]
    return None if any(value is None for _, value in merged) else merged


def _same(a: Any, number: int, b: Any, other: int) -> Any:
    if isinstance(a, str) and isinstance(b, str):
        return _same_name(a, number, b, other)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if list(a.values()) != list(b.values()):
            return None
        names = [_same_name(x, number, y, other) for x, y in zip(a, b, strict=True)]
        return None if None in names else dict(zip(names, a.values(), strict=True))
    return a if a == b else None


def _same_name(a: str, number: int, b: str, other: int) -> str | None:
    parts, others = a.split("."), b.split(".")
    if len(parts) != len(others):
        return None
    places = [i for i, (x, y) in enumerate(zip(parts, others, strict=True)) if x != y]
    if len(places) != 1 or (parts[places[0]], others[places[0]]) != (str(number), str(other)):
        return None
    return ".".join([*parts[: places[0]], "{}", *parts[places[0] + 1 :]])
