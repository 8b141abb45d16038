"""Figures on disk, written as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from tools.bench_bridge.styles import GUIDANCE, NEW, OLD, PROMPTS, STEPS
from tools.bench_bridge.summary import summary

from regraft._version import __version__


class Record:
    """Figures on disk, written as they come.

    Under ``measured``, in the same order as the figures themselves, stands when each was measured and by which version;
    ``date`` and ``regraft_version`` of the record are of its last writing.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        # Before each had its own date, the record's was that of all.
        if "date" in self.rows:
            known = _stamp(self.rows["date"], self.rows["regraft_version"])
            for way, *place in ways_in(self.rows):
                self.part("measured", *place).setdefault(way, known)

    def part(self, *names: str) -> dict[str, Any]:
        place = self.rows
        for name in names:
            place = place.setdefault(name, {})
        return place

    def put(self, way: str, figures: Mapping[str, Any], *place: str) -> None:
        """Take up a way's figures, and write all."""
        self.part(*place)[way] = dict(figures)
        self.part("measured", *place)[way] = _stamp(date.today().isoformat(), __version__)
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


def ways_in(rows: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Every way that a record has figures of: its name, and after it where that stands."""
    for style, seeds in rows.get("styles", {}).items():
        for seed, ways in seeds.items():
            yield from ((way, "styles", style, seed) for way in ways)
    for seed, ways in rows.get("controlnet", {}).items():
        yield from ((way, "controlnet", seed) for way in ways)
    if "cost" in rows:
        yield ("cost",)


def _stamp(day: str, version: str) -> str:
    return f"{day}, regraft {version}"
