"""Measured ports: what the forecast is fitted on and judged by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from regraft.forecast.curve import LEAST, MOST, Array


@dataclass(frozen=True)
class Row:
    """One adapter on one pair of bases, with what each way of carrying it recovered.

    Attributes:
        pair: name of the pair of bases.
        adapter: name of the adapter.
        seed: that it was trained with.
        figures: see `regraft.forecast.features`.
        recovery: way (``copy``, ``auto``, ``effect``, ``stream``, ``refine``, …) → share of a native adapter's gain.
    """

    pair: str
    adapter: str
    seed: int
    figures: Mapping[str, float]
    recovery: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        return cls(**{key: record[key] for key in ("pair", "adapter", "seed", "figures", "recovery")})

    def record(self) -> dict[str, Any]:
        """As JSON, figures rounded to what they are worth."""
        found = asdict(self)
        for key in ("figures", "recovery"):
            found[key] = {name: round(float(value), 4) for name, value in found[key].items()}
        return found


@dataclass(frozen=True)
class Table:
    """Rows as arrays, each adapter's seeds as one.

    Attributes:
        rows: those with the wanted recovery.
        figures: (rows, figures).
        recoveries: (rows,), within `LEAST` and `MOST`.
        pairs: (rows,), names.
    """

    rows: tuple[Row, ...]
    figures: Array
    recoveries: Array
    pairs: Sequence[str]

    @classmethod
    def of(cls, rows: Iterable[Row], way: str, names: Sequence[str]) -> Table:
        kept = tuple(over_seeds(row for row in rows if row.recovery.get(way) is not None))
        figures = np.array([[row.figures.get(name, 0.0) for name in names] for row in kept], dtype=np.float64)
        recoveries = np.clip([row.recovery[way] for row in kept], LEAST, MOST).astype(np.float64)
        return cls(kept, figures.reshape(len(kept), len(names)), recoveries, [row.pair for row in kept])

    @property
    def importance(self) -> Array:
        """Weights of the rows by which each pair counts the same."""
        counts = {pair: self.pairs.count(pair) for pair in set(self.pairs)}
        return np.array([1 / counts[pair] for pair in self.pairs])

    def without(self, pair: str) -> Table:
        return self._only([name != pair for name in self.pairs])

    def only(self, pair: str) -> Table:
        return self._only([name == pair for name in self.pairs])

    def _only(self, keep: Sequence[bool]) -> Table:
        chosen = np.array(keep, dtype=bool)
        rows = tuple(row for row, kept in zip(self.rows, keep, strict=True) if kept)
        return Table(rows, self.figures[chosen], self.recoveries[chosen], [row.pair for row in rows])


def over_seeds(rows: Iterable[Row]) -> list[Row]:
    """One row for each adapter on each pair: the means over its seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.pair, row.adapter), []).append(row)

    def means(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
        common = [name for name in records[0] if all(name in record for record in records)]
        return {name: float(np.mean([record[name] for record in records])) for name in common}

    return [
        Row(pair, adapter, group[0].seed, means([r.figures for r in group]), means([r.recovery for r in group]))
        for (pair, adapter), group in groups.items()
    ]
