"""Kinds of update: what an adapter does to one module. One file each."""

from __future__ import annotations

from regraft.updates.full import Full
from regraft.updates.lowrank import LowRank

Update = LowRank | Full

__all__ = ["Full", "LowRank", "Update"]
