"""Where the state of a refine is kept, so that one that was stopped can go on: by content, not by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regraft.adapter import Adapter
from regraft.base import Base
from regraft.cache import cache_folder
from regraft.content import content_of
from regraft.refine.settings import RefineSettings

# What may differ between a run and the one that goes on from it.
_FREE = ("steps", "budget", "patience", "device", "precision", "low_memory", "checkpointing")


def state_file(
    adapter: Adapter | str, old: Base, new: Base, start: Adapter | str | None, settings: RefineSettings
) -> Path:
    """The file for one refine: of this adapter (or its digest), these bases, and these settings."""
    asked = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    content = {
        "adapter": adapter if isinstance(adapter, str) else content_of(adapter),
        "old": str(old.prints),
        "new": str(new.prints),
        "start": content_of(start) if isinstance(start, Adapter) else start,
        "settings": asked,
    }
    return kept_file(content)


def kept_file(content: Mapping[str, Any], kind: str = "") -> Path:
    """The cache's file of what depends on this content alone."""
    text = json.dumps(content, sort_keys=True, default=str)
    return cache_folder() / "refine" / f"{kind}{hashlib.sha256(text.encode()).hexdigest()[:24]}.pt"


def forget(state: Path) -> None:
    """Remove a state that is no longer wanted."""
    state.unlink(missing_ok=True)
