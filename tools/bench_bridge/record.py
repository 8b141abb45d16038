"""Figures on disk, written as they come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from tools.bench_bridge.styles import GUIDANCE, NEW, OLD, PROMPTS, STEPS
from tools.bench_bridge.summary import summary

from regraft._version import __version__


class Record:
    """Figures on disk, written as they come."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}

    def part(self, *names: str) -> dict[str, Any]:
        place = self.rows
        for name in names:
            place = place.setdefault(name, {})
        return place

    def put(self, way: str, figures: Mapping[str, Any], *place: str) -> None:
        """Take up a way's figures, and write all."""
        self.part(*place)[way] = dict(figures)
        print(*place, way, figures, flush=True)
        self.write()

    def finish(self, command: str) -> None:
        """Write what the figures come to, and which commands they are of."""
        before = self.rows.pop("commands", []) or [self.rows.pop("command", None)]
        self.rows |= {
            "commands": [one for one in dict.fromkeys([*before, command]) if one is not None],
            "date": date.today().isoformat(),
            "regraft_version": __version__,
            "pair": [OLD, NEW],
            "pictures": len(PROMPTS),
            "steps": STEPS,
            "guidance": GUIDANCE,
            "summary": summary(self.rows),
        }
        self.write()

    def write(self) -> None:
        self.out.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
