"""The calibration that ships with the package: curves by way and stage, and the measured ports that they rest on.

The file is written by ``python -m tools.fit_forecast``; nothing is fitted when a forecast is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from regraft.forecast.curve import Curve
from regraft.forecast.features import FIGURES, Stage
from regraft.forecast.fitting import Fitted, fit_table
from regraft.forecast.rows import Row, Table
from regraft.report.schema import Forecast

#: The stages, from the one that knows least.
STAGES: tuple[Stage, ...] = ("headers", "weights", "activations")
#: Ways that leave an adapter as it is where both bases are the same: no figure shows damage, so there is none.
EXACT = ("copy", "auto")
# Fewer pairs than these say nothing of another one.
_LEAST_PAIRS = 3


@dataclass(frozen=True)
class Calibration:
    """Fitted curves.

    Attributes:
        fits: (way, stage) → curve and width.
        rows: measured ports.
        made: how, for people.
    """

    fits: Mapping[tuple[str, Stage], Fitted]
    rows: tuple[Row, ...]
    made: Mapping[str, Any] = field(default_factory=dict)
    _tables: dict[tuple[str, Stage], Table] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def fitted(cls, rows: Iterable[Row], made: Mapping[str, Any] | None = None) -> Calibration:
        """Fit every way and stage that enough pairs were measured for."""
        rows = tuple(rows)
        fits: dict[tuple[str, Stage], Fitted] = {}
        for way in dict.fromkeys(way for row in rows for way in row.recovery):
            for stage in STAGES:
                table = table_of(rows, way, stage)
                if len(set(table.pairs)) >= _LEAST_PAIRS:
                    fits[way, stage] = fit_table(table, FIGURES[stage], offset=has_offset(way, stage))
        return cls(fits, rows, made or {})

    def forecast(self, way: str, figures: Mapping[str, float], stage: Stage) -> Forecast | None:
        """What to expect of one way, or None where too little was measured.

        Args:
            way: method or tier.
            figures: see `regraft.forecast.features`.
            stage: the last one that was reached; an earlier one is taken where the way has no curve for it.
        """
        for known in STAGES[STAGES.index(stage) :: -1]:
            fitted = self.fits.get((way, known))
            if fitted is None:
                continue
            point = np.array([figures.get(name, 0.0) for name in FIGURES[known]])
            low, high = fitted.interval(point, self._table(way, known))
            expected = fitted.curve.recovery(figures)
            return Forecast(
                recovery=expected,
                low=min(low, expected),
                high=max(high, expected),
                basis=known,
                pairs=fitted.pairs,
                adapters=fitted.adapters,
            )
        return None

    def _table(self, way: str, stage: Stage) -> Table:
        # The rows never change, and a batch asks for each adapter.
        if (way, stage) not in self._tables:
            self._tables[way, stage] = table_of(self.rows, way, stage)
        return self._tables[way, stage]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        fits: dict[str, Any] = {}
        for (way, stage), fitted in self.fits.items():
            fits.setdefault(way, {})[stage] = asdict(fitted)
        return {"made": dict(self.made), "fits": fits, "rows": [row.record() for row in self.rows]}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Calibration:
        fits: dict[tuple[str, Stage], Fitted] = {}
        for way, stages in record["fits"].items():
            for stage, found in stages.items():
                curve = found["curve"]
                curve = Curve(tuple(curve["names"]), tuple(curve["weights"]), curve["offset"])
                fits[way, stage] = Fitted(**{**found, "curve": curve, "spans": tuple(found["spans"])})
        return cls(fits, tuple(map(Row.of, record["rows"])), record["made"])


def table_of(rows: Iterable[Row], way: str, stage: Stage) -> Table:
    """The rows that have every figure of a stage, and a recovery of this way."""
    names = FIGURES[stage]
    return Table.of((row for row in rows if all(name in row.figures for name in names)), way, names)


def has_offset(way: str, stage: Stage) -> bool:
    """Whether some damage is to be expected where no figure shows any: headers don't show drift."""
    return stage == "headers" or way not in EXACT


@cache
def shipped() -> Calibration:
    """The package's own calibration."""
    file = resources.files("regraft.forecast") / "calibration.json"
    return Calibration.of(json.loads(file.read_text(encoding="utf-8")))
