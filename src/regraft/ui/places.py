"""What can be chosen without typing: what was used before, what lies in the hub's cache, what a folder holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from regraft.cache import cache_folder
from regraft.errors import RegraftError
from regraft.output import write_text
from regraft.tensor_files import WEIGHTS_SUFFIXES

_KEPT = 12
# Deeper than models/checkpoints/sdxl/x.safetensors, a tree is no longer one of models.
_DEEPEST = 4
# A file of this many bytes or more is a base, of fewer an adapter: the largest adapters have about so many.
_BASE_BYTES = 900_000_000
_MOST = 400


def recent() -> list[str]:
    """Bases that were used before, the last one first."""
    try:
        kept = json.loads(_file().read_text(encoding="utf-8")).get("bases")
        return [text for text in kept if isinstance(text, str)][:_KEPT] if isinstance(kept, list) else []
    except (OSError, ValueError, AttributeError):
        return []


def remember(*used: str) -> None:
    """Put bases first for the next time; a folder that can't be written to is no reason to stop."""
    kept = {"bases": list(dict.fromkeys([*used, *recent()]))[:_KEPT]}
    with suppress(OSError, RegraftError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(kept, indent=1), _file(), overwrite=True)


def _file() -> Path:
    return cache_folder() / "ui.json"


def in_hub_cache() -> list[str]:
    """Ids of the models that the hub's cache holds."""
    from regraft.hub.access import cache_folder as hub_folder

    with suppress(OSError):
        names = sorted(folder.name for folder in hub_folder().glob("models--*--*") if folder.is_dir())
        return [name.removeprefix("models--").replace("--", "/") for name in names]
    return []


def bases_in(folders: Iterable[Path]) -> list[str]:
    """Bases below some folders: those of transformers and diffusers, and large weights files."""
    found: list[str] = []
    for folder in folders:
        for path in _walk(folder):
            if path.is_dir() or path.stat().st_size >= _BASE_BYTES:
                found.append(str(path))
            if len(found) >= _MOST:
                return found
    return found


def _walk(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Folders that are one model, and weights files that are in no such folder."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    if any(entry.name in ("model_index.json", "config.json") for entry in entries):
        yield folder
        return
    for entry in entries:
        with suppress(OSError):
            if entry.is_dir() and depth < _DEEPEST and not entry.name.startswith("."):
                yield from _walk(entry, depth + 1)
            elif entry.is_file() and entry.suffix.lower() in WEIGHTS_SUFFIXES:
                yield entry
