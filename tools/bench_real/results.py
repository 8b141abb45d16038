"""Result files: how they were made, per seed, and mean ± std; rewritten after every step that adds a figure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def header(command: str) -> dict[str, Any]:
    """How and with what a result was made."""
    packages = ("regraft", "torch", "transformers", "peft", "safetensors")
    return {
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: version(name) for name in packages},
    }


def spread(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean, standard deviation over seeds (None for one) and number; None without values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = round(stdev(known), 4) if len(known) > 1 else None
    return {"mean": round(mean(known), 4), "std": std, "n": len(known)}


def write(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, file)
