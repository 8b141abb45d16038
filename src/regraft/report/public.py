"""A page is for posting: what its record holds that a stranger should not see, or has seen already, is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

from regraft.report.schema import Record

R = TypeVar("R", bound=Record)

_HUB_CACHE = re.compile(r"models--([^/\\]+)--([^/\\]+)")
_LOCAL = re.compile(r"^(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\)")
_PATH_FIELDS = {"input", "outputs", "path", "migration", "original", "ported", "from", "to", "file", "start"}


def _paths(node: Any, key: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _paths(child, name)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _paths(child, key)
    elif isinstance(node, str) and key in _PATH_FIELDS and _LOCAL.match(node):
        yield node


def _short(path: str, parts: int = 1) -> str:
    hub = _HUB_CACHE.search(path)
    if hub:
        return f"{hub[1]}/{hub[2]}"
    return "/".join([part for part in re.split(r"[/\\]", path) if part][-parts:]) or path


def without_folders(record: R) -> R:
    """The record with local paths cut to the file's name, wherever they stand, and to two parts where names clash."""
    raw = record.model_dump(by_alias=True)
    paths = sorted(set(_paths(raw)), key=len, reverse=True)
    names = [_short(path) for path in paths]
    shown = {p: n if names.count(n) == 1 else _short(p, 2) for p, n in zip(paths, names, strict=True)}

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: child if key == "png" else walk(child) for key, child in node.items()}
        if isinstance(node, (list, tuple)):
            return [walk(child) for child in node]
        if isinstance(node, str):
            for path, name in shown.items():
                node = node.replace(path, name)
        return node

    return type(record).model_validate(walk(raw)) if shown else record


def without_pictures(record: R) -> R:
    """The record with its pictures' bytes left out: they stand on the page once already."""

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: [] if key == "png" else walk(child) for key, child in node.items()}
        return [walk(child) for child in node] if isinstance(node, (list, tuple)) else node

    return type(record).model_validate(walk(record.model_dump(by_alias=True)))
