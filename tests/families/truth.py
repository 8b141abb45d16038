"""Lists of real models' names and shapes, as the real libraries and converters gave them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden"
BASES = GOLDEN / "bases"


def read(folder: Path, name: str) -> dict[str, Any]:
    for file in (folder / f"{name}.json.gz", folder / f"{name}.json"):
        if file.is_file():
            raw = file.read_bytes()
            found: dict[str, Any] = json.loads(gzip.decompress(raw) if file.suffix == ".gz" else raw)
            return found
    raise FileNotFoundError(name)


def listed(name: str) -> dict[str, Any]:
    """A list of ``tests/golden/bases`` by its name without suffix."""
    return read(BASES, name)
