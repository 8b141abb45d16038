"""Where the state of a refine is kept, so that one that was stopped can go on: by content, not by name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from regraft.adapter import Adapter
from regraft.base import Base
from regraft.content import content_of
from regraft.refine.settings import RefineSettings
from regraft.runtime.training_state import kept_file

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
    return kept_file("refine", content)


def forget(state: Path) -> None:
    """Remove a state that is no longer wanted."""
    state.unlink(missing_ok=True)
