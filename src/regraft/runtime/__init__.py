"""Running the real models: loading a base as its own class, and applying an adapter to it for a while."""

from __future__ import annotations

from regraft.runtime.applied import applied, fitting
from regraft.runtime.libraries import quiet_libraries
from regraft.runtime.load import Loaded, load_model

__all__ = ["Loaded", "applied", "fitting", "load_model", "quiet_libraries"]
