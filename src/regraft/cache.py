"""Fitted migrations kept between runs, keyed by both fingerprints, the method and its options."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from regraft._version import __version__
from regraft.adapter import ModuleRef
from regraft.base import Base
from regraft.errors import OutputError, RegraftError, first_line
from regraft.migration import Migration, summarise
from regraft.migration_file import load_migration, save_migration
from regraft.migrations.maps import in_memory
from regraft.migrations.model import VERSION

#: Bytes of the largest fit for one adapter that is worth a file. The one whole pair that `regraft.batch` keeps may be
#: larger.
MOST_KEPT = 512 << 20


def cache_folder() -> Path:
    """``$REGRAFT_CACHE``, or the platform's place for caches."""
    if "REGRAFT_CACHE" in os.environ:
        return Path(os.environ["REGRAFT_CACHE"]).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "regraft" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "regraft"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "regraft"


def cached_files() -> list[Path]:
    """Every cached migration, newest first."""
    folder = cache_folder()
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    return sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)


def cached_inputs() -> list[Path]:
    """What models made for a refine, and the states of trainings that were stopped."""
    folders = [cache_folder() / name for name in ("refine", "train")]
    return sorted(file for folder in folders if folder.is_dir() for file in folder.glob("*.pt"))


def clear_cache() -> int:
    """Delete every cached migration, and what is kept of refines; returns the bytes freed.

    Raises:
        OutputError: a file can't be deleted.
    """
    freed = 0
    for file in [*cached_files(), *cached_inputs()]:
        try:
            size = file.stat().st_size
            file.unlink()
        except FileNotFoundError:
            # Another run was quicker.
            continue
        except OSError as error:
            raise OutputError(
                f"can't be deleted ({error.strerror or first_line(error)})",
                file=file,
                remedy="Is another program using it?",
            ) from None
        freed += size
    return freed


def _place(old: Base, new: Base, method: str, options: Mapping[str, Any]) -> Path:
    key = json.dumps(
        [VERSION, __version__, old.fingerprint, new.fingerprint, method, dict(options)], sort_keys=True, default=str
    )
    return cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def find_cached(
    old: Base, new: Base, method: str, options: Mapping[str, Any], wanted: Iterable[ModuleRef]
) -> Migration | None:
    """A cached migration that covers every wanted module, or None. A damaged file counts as none.

    Up to `MOST_KEPT` bytes of it come whole into memory; the maps of a larger one are read as they are used.
    """
    file = _place(old, new, method, options)
    if not file.is_file():
        return None
    with suppress(RegraftError):
        migration = load_migration(file)
        if file.stat().st_size <= MOST_KEPT:
            # Another run may replace a file that this one still reads from; and damage shows now.
            migration = in_memory(migration)
        if all(module in migration.entries for module in wanted):
            # A port tells the same whether its migration was fitted now or before: of the bases, not of the cache.
            return replace(migration, source=summarise(old), target=summarise(new), digest=None)
    return None


def size_at_most(base: Base, modules: Iterable[ModuleRef]) -> int:
    """Bytes of a migration of these modules by their shapes: two full sets of singular vectors each, in float32."""
    shapes = [(shape[0], prod(shape[1:])) for shape in map(base.shape, modules)]
    return sum(4 * (out + inp) * min(out, inp) for out, inp in shapes)


def keep(migration: Migration, old: Base, new: Base, method: str, options: Mapping[str, Any]) -> None:
    """Add a migration to the cache, beside the modules that an earlier one of the same key covers.

    A cache that can't be written (read-only home, full disk) is no reason to fail.
    """
    with suppress(RegraftError, OSError):
        file = _place(old, new, method, options)
        file.parent.mkdir(parents=True, exist_ok=True)
        earlier = find_cached(old, new, method, options, ())
        if earlier is not None and earlier.used == migration.used:
            migration = replace(migration, entries={**earlier.entries, **migration.entries})
        save_migration(migration, file, overwrite=True)
