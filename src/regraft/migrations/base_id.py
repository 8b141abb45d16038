"""How a base is named in a lineage or migration, and back."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from regraft.base import Base
from regraft.lineage.model import BaseId
from regraft.migration import summarise
from regraft.report.schema import BaseSummary


def public_name(path: str) -> str:
    """What may be published of where a base lay: a hub id with its revision, or the last part of a path.

    >>> public_name("/cache/models--org--name/snapshots/abc123")
    'org/name@abc123'
    >>> public_name("C:\\\\models\\\\v1.safetensors")
    'v1.safetensors'
    """
    parts = PureWindowsPath(path).parts if "\\" in path else PurePosixPath(path).parts
    for i, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[i + 1] == "snapshots":
            return part.removeprefix("models--").replace("--", "/") + "@" + parts[i + 2]
    return parts[-1] if parts else path


def base_id(base: Base, *, exact: bool = False) -> dict[str, Any]:
    """The object that names a base on disk; ``exact`` reads all of it, for the hash of every stored byte."""
    return from_summary(summarise(base, exact=exact))


def from_summary(base: BaseSummary) -> dict[str, Any]:
    """The object that names a base, without the folder that it lay in."""
    named = {
        "fingerprint": base.fingerprint,
        "structure": base.structure,
        "sketch": base.sketch,
        "components": base.components,
        "content": base.content,
        "family": base.family,
        "name": public_name(base.path),
    }
    return {key: value for key, value in named.items() if value}


def to_summary(base: BaseId) -> BaseSummary:
    """The same as the records have it."""
    return BaseSummary(
        path=base.name or base.fingerprint,
        family=base.family,
        fingerprint=base.fingerprint,
        structure=base.structure or "",
        sketch=base.sketch,
        components=dict(base.components),
        content=dict(base.content),
    )


def called(base: BaseId) -> str:
    """What a base is called before people: its name, or its fingerprint."""
    return base.name or base.fingerprint
