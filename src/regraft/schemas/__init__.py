"""The JSON Schemas (draft 2020-12) of the standard, as package data: see docs/standard.md."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Literal


def standard_schema(name: Literal["lineage", "migration"]) -> dict[str, Any]:
    """The schema of a lineage, or of a migration's header (which refers to the former by its ``$id``)."""
    found: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return found
