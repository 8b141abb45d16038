"""From measured figures to a library that nobody has measured: plain arithmetic, its assumptions said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ADAPTERS, MACHINES = 1_000_000, 50
#: Workers of a machine: as measured, and as a server has them.
WORKERS = (2, 16)


@dataclass(frozen=True)
class Measured:
    """What one batch on one machine took.

    Attributes:
        worker_seconds: of one worker for an adapter, while the machine's other workers are at work.
        mb_read: of an adapter.
        mb_written: of its port.
        start_up_seconds: until a row can begin, without the fit.
        fit_seconds: of one pair of bases.
        driver_ms: of the driver's processor for each row, while rows come.
        closing_ms: for each row once all are there, for the tables.
        driver_kb: of the driver's memory for each row, at its peak.
    """

    worker_seconds: float
    mb_read: float
    mb_written: float
    start_up_seconds: float
    fit_seconds: float
    driver_ms: float
    closing_ms: float
    driver_kb: float


def on_paper(
    found: Measured, *, adapters: int = ADAPTERS, machines: int = MACHINES, workers: int, pairs: int = 1
) -> dict[str, Any]:
    """Hours of a whole library on several machines.

    It is assumed that every machine's worker is as fast as a measured one; that disk and network give each machine the
    stated bytes a second; that all machines wait while a pair is fitted, as they do for the first; and that the driver
    notes rows as fast as measured, on a machine of its own: where it can't keep up, its hours are the hours.

    Args:
        found: on one machine.
        adapters: of the library.
        machines: alike.
        workers: of a machine.
        pairs: of bases.

    Returns:
        wall hours, machine hours, what bounds them, the bytes a second of each machine, the driver's hours and GB.
    """
    at_work = adapters * found.worker_seconds / (machines * workers)
    driver, closing = adapters * found.driver_ms / 1e3, adapters * found.closing_ms / 1e3
    wall = found.start_up_seconds + pairs * found.fit_seconds + max(at_work, driver) + closing
    return {
        "adapters": adapters,
        "machines": machines,
        "workers": workers,
        "pairs": pairs,
        "wall_hours": round(wall / 3600, 3),
        "machine_hours": round(wall * machines / 3600, 2),
        "bound_by": "workers" if at_work >= driver else "driver",
        "mb_a_second_of_a_machine": round(
            adapters * (found.mb_read + found.mb_written) / machines / max(at_work, driver), 2
        ),
        "driver_hours": round((driver + closing) / 3600, 3),
        "driver_gb": round(adapters * found.driver_kb / 1e6, 2),
    }


def measured(library: dict[str, Any], other: dict[str, Any] | None = None) -> Measured:
    """The figures of a library's record, with two workers.

    Args:
        library: whose adapters are meant.
        other: a library with another number of rows: what tables take for each row is the slope between the two. With
            one alone, or two of one size, what they take at all is laid on its rows.
    """
    sloped = other if other is not None and other["adapters"] != library["adapters"] else {"adapters": 0}
    few, many = sorted((library, sloped), key=lambda one: int(one["adapters"]))
    nothing = {"closing_seconds": 0.0, "closing_mb": 0.0}
    more = many["adapters"] - few["adapters"]
    before, after = few.get("workers_2", nothing), many["workers_2"]
    closing = {name: max(after[name] - before[name], 0.0) / more for name in nothing}
    two, least, count = library["workers_2"], library["floor"], library["adapters"]
    return Measured(
        worker_seconds=two["rows_seconds"] * 2 / count,
        mb_read=least["mb_read"] / count,
        mb_written=least["mb_written"] / count,
        start_up_seconds=two["start_up_seconds"],
        fit_seconds=two["fit_seconds"],
        # While rows come, where most of them came.
        driver_ms=after["driver_ms_a_row"],
        closing_ms=closing["closing_seconds"] * 1e3,
        driver_kb=max(after["driver_kb_a_row"], 0.0) + closing["closing_mb"] * 1e3,
    )
