"""How a port's time and memory grow: with modules, width, rank, and adapters on one pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from shutil import rmtree

import numpy as np

from regraft.bench.speed.making import grid_geometry, write_lora
from regraft.bench.speed.measure import RANK, Bench, start_of
from regraft.bench.speed.timing import Spent, median_of, spent
from regraft.report.speed_schema import SpeedCurve
from regraft.tensors import Shape

#: What grows, in which steps.
MODULES, WIDTHS = (100, 200, 400, 800), (320, 640, 1280, 2048, 3072)
RANKS, ADAPTERS = (4, 16, 64, 128), (1, 10, 40, 100)
_WIDTH, _MODULES = 1024, 100


@dataclass(frozen=True)
class _Point:
    value: float
    gigabytes: float
    spent: Spent


def curves(folder: Path, *, threads: int, runs: int, method: str, tick: Callable[[str], None]) -> Iterator[SpeedCurve]:
    """Measure all four, one after the other; a pair's files are removed once it is measured.

    Args:
        folder: for the files.
        threads: that torch may use.
        runs: of which the median is taken.
        method: of the ports.
        tick: called with what is at work.

    Raises:
        RegraftError: a command failed, or there is no room for the files.
    """
    start = start_of(threads)

    def ported(bench: Bench, modules: int, rank: int, value: float) -> _Point:
        names = dict(list(bench.pair.touched().items())[:modules])
        write_lora(bench.lora, names, bench.pair.component, rank)
        found = bench.over(start, bench.port(method), bench.bases)
        return _Point(value, (_weights(names) + bench.lora.stat().st_size) / 1e9, found)

    def over(along: str, steps: Sequence[int], point: Callable[[int], _Point]) -> SpeedCurve:
        points = []
        for step in steps:
            tick(f"{along} {step}")
            points.append(point(step))
        return _curve(along, points)

    place = folder / "curves"
    try:
        large = Bench(grid_geometry(_WIDTH, max(MODULES)), place / "modules", threads, runs)
        large.write()
        yield over("modules", MODULES, lambda count: ported(large, count, RANK, count))
        rmtree(large.folder)

        def of_width(width: int) -> _Point:
            bench = Bench(grid_geometry(width, _MODULES), place / "width", threads, runs)
            bench.write()
            found = ported(bench, _MODULES, RANK, width)
            rmtree(bench.folder)
            return found

        yield over("width", WIDTHS, of_width)
        small = Bench(grid_geometry(_WIDTH, _MODULES), place / "small", threads, runs)
        small.write()
        yield over("rank", RANKS, lambda rank: ported(small, _MODULES, rank, rank))
        yield over("adapters", ADAPTERS, lambda count: _library(small, start, count, method))
    finally:
        rmtree(place, ignore_errors=True)


def _weights(modules: Mapping[str, Shape]) -> int:
    """Bytes of these modules' weights in both bases, in half precision."""
    return sum(2 * 2 * prod(shape) for shape in modules.values())


def _library(bench: Bench, start: Spent, count: int, method: str) -> _Point:
    """Many adapters on one pair, by `regraft batch` with one worker; the memory is the larger process's."""
    loras, out = bench.folder / "loras", bench.folder / "out"
    names = bench.pair.touched()
    size = 0
    for index in range(count):
        file = write_lora(loras / f"{index}.safetensors", names, bench.pair.component, RANK, seed=index)
        size += file.stat().st_size
    ends = ["--from", str(bench.bases[0]), "--to", str(bench.bases[1]), "--out", str(out), "--jobs", "1"]
    arguments = ["-m", "regraft", "batch", str(loras), *ends, "-m", method, "--quiet"]
    found = []
    for _ in range(bench.runs):
        found.append(spent(arguments, threads=bench.threads, cold=bench.bases))
        # A second run would find all done.
        rmtree(out)
    rmtree(loras)
    return _Point(count, (_weights(names) + size) / 1e9, median_of(found).beyond(start))


def _curve(along: str, points: Sequence[_Point]) -> SpeedCurve:
    x, y = np.array([p.gigabytes for p in points]), np.array([p.spent.seconds for p in points])
    slope, offset = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    bytes_count = along != "rank"
    return SpeedCurve(
        along=along,
        values=[p.value for p in points],
        gigabytes=[p.gigabytes for p in points],
        seconds=[p.spent.seconds for p in points],
        peak_mb=[p.spent.peak_mb for p in points],
        seconds_per_gigabyte=float(slope) if bytes_count else None,
        fit=1 - float(((y - slope * x - offset) ** 2).sum()) / spread if bytes_count and spread > 0 else None,
    )
