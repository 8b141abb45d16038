"""What a record's figures come to: means over styles and seeds, gains as shares, and what was to be reached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: A way's figures; a case's, by way.
Figures = Mapping[str, float]
Ways = Mapping[str, Figures]

ALONE, NATIVE, BRIDGE, DELTA, DISTILLED = "new alone", "native", "X-Adapter", "delta", "distilled"


def summary(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Means over styles and seeds; gains as shares of the native adapter's, and the distilled one's of the bridge's.

    Args:
        rows: a record's: ``styles`` by name and seed, ``controlnet`` by seed.
    """
    cases, steered = style_cases(rows), net_cases(rows)
    found: dict[str, Any] = {}
    for way in _ways(cases):
        here = [case for case in cases if way in case]
        found[way] = {
            **mean([case[way] for case in here]),
            "share": mean([shares(case, way) for case in here]),
            "cases": len(here),
        }
    nets: dict[str, Any] = {}
    for way in _ways(steered):
        here = [case for case in steered if way in case]
        gains = mean([{"share": gain(case, way, NATIVE, "agreement")} for case in here])
        nets[way] = {**mean([case[way] for case in here]), **gains, "cases": len(here)}
    both = _shares(cases, DISTILLED, BRIDGE)
    shown = {**mean(both), "cases": len(both)} if both else {}
    return {"styles": found, "controlnet": nets, "distilled": shown, "best_strength": best_strength(cases)}


def style_cases(rows: Mapping[str, Any]) -> list[Ways]:
    """Every style and seed whose native adapter was measured."""
    return [case for seeds in rows.get("styles", {}).values() for case in seeds.values() if NATIVE in case]


def net_cases(rows: Mapping[str, Any]) -> list[Ways]:
    """Every seed whose native ControlNet was measured."""
    return [case for case in rows.get("controlnet", {}).values() if NATIVE in case]


def shares(ways: Ways, way: str, of: str = NATIVE) -> dict[str, float]:
    """A way's gain in style and look over the new base alone, as shares of another's; and its things of that one's.

    Args:
        ways: figures of one case.
        way: whose.
        of: the other; a gain that it has not is left out.
    """
    found = {name: gain(ways, way, of, name) for name in ("style", "judge") if ways[of][name] != ways[ALONE][name]}
    wanted = ways[of]["concept"]
    return {**found, "concept": ways[way]["concept"] / wanted if wanted else float("nan")}


def gain(ways: Ways, way: str, of: str, name: str) -> float:
    """A figure's gain over the new base alone, as a share of another way's."""
    alone = ways[ALONE][name]
    return (ways[way][name] - alone) / (ways[of][name] - alone)


def mean(rows: Sequence[Figures]) -> dict[str, float]:
    """Of each figure, over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: round(float(np.mean([row[name] for row in rows if name in row])), 4) for name in names}


def best_strength(cases: Iterable[Ways]) -> str | None:
    """The way of delta sampling whose share of style, times the things kept, is largest; None where one was measured.

    Args:
        cases: of which the first with several is taken.
    """
    for case in cases:
        rows = {way: shares(case, way) for way in case if way.startswith(DELTA)}
        if len(rows) > 1:
            return max(rows, key=lambda way: rows[way].get("style", 0.0) * rows[way]["concept"])
    return None


@dataclass(frozen=True)
class Goal:
    """One thing that was to be reached.

    Attributes:
        claim: what it was.
        least: that was asked for.
        values: of each style and seed; none where it was not measured.
    """

    claim: str
    least: float
    values: tuple[float, ...]

    @property
    def measured(self) -> float:
        """The mean of all, to four digits."""
        return round(float(np.mean(self.values)), 4) if self.values else float("nan")

    @property
    def reached(self) -> bool:
        return self.measured >= self.least

    @property
    def held(self) -> int:
        """Cases that reach it."""
        return sum(value >= self.least for value in self.values)


def goals(rows: Mapping[str, Any]) -> list[Goal]:
    """All of them, by a record's figures."""
    cases, nets = style_cases(rows), net_cases(rows)
    bridge, delta = (_shares(cases, way, NATIVE) for way in (BRIDGE, DELTA))
    shown = _shares(cases, DISTILLED, BRIDGE)
    steered = [{"share": gain(case, BRIDGE, NATIVE, "agreement")} for case in nets if BRIDGE in case]
    asked = [
        (f"{BRIDGE}: style, share of native", 0.8, bridge, "style"),
        (f"{BRIDGE}: things kept", 0.9, bridge, "concept"),
        ("delta sampling: style, share of native", 0.6, delta, "style"),
        ("delta sampling: things kept", 0.9, delta, "concept"),
        (f"ControlNet through {BRIDGE}: agreement, share of native", 0.8, steered, "share"),
        *((f"distilled: {what}, share of the bridge's", 0.9, shown, name) for what, name in _SHOWN.items()),
    ]
    # To the digits that a record keeps: what is at the mark reaches it.
    return [
        Goal(claim, least, tuple(round(case[name], 4) for case in of if name in case))
        for claim, least, of, name in asked
    ]


_SHOWN = {"style": "style", "look": "judge", "things": "concept"}


def _shares(cases: Iterable[Ways], way: str, of: str) -> list[dict[str, float]]:
    return [shares(case, way, of) for case in cases if way in case and of in case]


def _ways(cases: Iterable[Ways]) -> list[str]:
    return list(dict.fromkeys(way for case in cases for way in case))
