"""One family at its true size: what each job takes, beside the disk and the plain way."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from time import process_time
from typing import Any

import psutil

from regraft._version import __version__
from regraft.bench.speed.making import Geometry, write_lora, write_pair
from regraft.bench.speed.plain import way_of
from regraft.bench.speed.timing import Spent, can_forget, environment, median_of, reading, spent, writing
from regraft.bench.variants import parse_variants
from regraft.errors import RegraftError, first_line
from regraft.report.speed_schema import MethodSpeed, RunningSpeed, ShapeCount, SpeedReport

#: Measured by default. Those that run both models have a cost of another kind: see `bench`.
METHODS = ("copy", "auto", "lora-x", "lora-x edge=0.35", "prolora", "procrustes")
_START = ("-c", "import torch, regraft.cli.port, regraft.cli.check; from regraft.formats import formats; formats()")
RANK = 16
# Of the adapter that `inspect` is measured on.
_INSPECTED_MB = 200
_N_INPUTS = 192

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """A pair on disk, and how it is measured.

    Attributes:
        pair: its geometry.
        folder: where its files lie.
        threads: that torch may use.
        runs: of which the median is taken.
    """

    pair: Geometry
    folder: Path
    threads: int
    runs: int

    @property
    def bases(self) -> list[Path]:
        return [self.folder / "old.safetensors", self.folder / "new.safetensors"]

    @property
    def lora(self) -> Path:
        return self.folder / "lora.safetensors"

    @property
    def out(self) -> Path:
        return self.folder / "ported.safetensors"

    @property
    def large(self) -> Path:
        return self.folder / "large.safetensors"

    @property
    def copied(self) -> Path:
        return self.folder / "copied.tmp"

    def write(self) -> None:
        """The bases and the adapter, where they are not there yet.

        Raises:
            OutputError: there is no room for them.
        """
        write_pair(self.pair, self.folder)
        write_lora(self.lora, self.pair.touched(), self.pair.component, RANK)

    def command(self, verb: str, *arguments: str, ends: bool = True) -> list[str]:
        """Arguments of the interpreter for one verb on the pair."""
        from_to = ["--from", str(self.bases[0]), "--to", str(self.bases[1])] if ends else []
        threads = ["--threads", str(self.threads)] if ends else []
        return ["-m", "regraft", verb, str(self.lora), *from_to, *threads, "--quiet", *arguments]

    def port(self, method: str, *arguments: str) -> list[str]:
        """A cold port: from the checkpoints alone, running no model."""
        variant = parse_variants([method])[0]
        given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in variant.asked.items()]
        weights_only = ["--weights-only"] if variant.method == "auto" else []
        own = ["-m", variant.method, *chain.from_iterable(given), *weights_only, "--no-cache", "--force", "--overwrite"]
        return self.command("port", *own, "-o", str(self.out), *arguments)

    def over(self, start: Spent, arguments: Sequence[str], cold: Sequence[Path] = ()) -> Spent:
        """The median run of a command, beyond the interpreter's start."""
        found = [spent(arguments, threads=self.threads, cold=cold) for _ in range(self.runs)]
        return median_of(found).beyond(start)


def start_of(threads: int, runs: int = 3) -> Spent:
    """The interpreter with torch and all that a port imports; the least of several, since a first one fills caches."""
    return min((spent(_START, threads=threads) for _ in range(runs)), key=lambda one: one.seconds)


def measure(
    pair: Geometry,
    folder: Path,
    methods: Sequence[str],
    *,
    threads: int,
    runs: int,
    command: str,
    date: str,
    tick: Tick,
    keep: Callable[[SpeedReport], None] = lambda report: None,
) -> SpeedReport:
    """All figures of one family but the curves.

    Args:
        pair: its names and shapes.
        folder: for the checkpoints; what is there already is used again.
        methods: names of registered methods, with options where wanted (``lora-x edge=0.35``).
        threads: that torch may use.
        runs: of which the median is taken; the plain way is measured once.
        command: as it was given.
        date: of today.
        tick: called with what is at work.
        keep: called with what is measured so far, after each method.

    Raises:
        RegraftError: a command failed, or there is no room for the files.
    """
    if not hasattr(os, "wait4"):
        raise RegraftError("the memory of a process can't be measured on this system", remedy="Measure on Linux.")
    bench = Bench(pair, folder / pair.name, threads, runs)
    try:
        return _measured(bench, methods, command=command, date=date, tick=tick, keep=keep)
    finally:
        # The checkpoints alone stay, where the folder does.
        for file in (bench.lora, bench.out, bench.large, bench.copied):
            file.unlink(missing_ok=True)


def _measured(
    bench: Bench,
    methods: Sequence[str],
    *,
    command: str,
    date: str,
    tick: Tick,
    keep: Callable[[SpeedReport], None],
) -> SpeedReport:
    pair, threads, runs = bench.pair, bench.threads, bench.runs
    tick("writing both checkpoints")
    bench.write()
    touched = pair.touched()
    start = start_of(threads)
    tick("reading both checkpoints")
    began = process_time()
    read_s = statistics.median(reading(bench.bases) for _ in range(runs))
    read_processor_s = (process_time() - began) / runs
    adapter_s = reading([bench.lora]) + writing(bench.lora, bench.copied)
    tick("check")
    check = bench.over(start, bench.command("check"), bench.bases)
    tick("inspect")
    adapter_mb = bench.lora.stat().st_size / 1e6
    write_lora(bench.large, touched, pair.component, max(1, round(RANK * _INSPECTED_MB / adapter_mb)))
    inspect = bench.over(start, ["-m", "regraft", "inspect", str(bench.large), "--quiet"], [bench.large])
    found: dict[str, MethodSpeed] = {}
    sizes: dict[str, float] = {}
    migration_read: dict[str, float] = {}
    counts = Counter(touched.values())

    def report() -> SpeedReport:
        return SpeedReport(
            regraft_version=__version__,
            command=command,
            date=date,
            machine={"processor": platform.machine(), "cores": os.cpu_count() or 1, "system": platform.system()},
            threads=threads,
            runs=runs,
            cold=can_forget(bench.folder),
            family=pair.name,
            title=pair.title,
            modules=len(touched),
            rank=RANK,
            shapes=[ShapeCount(shape=list(shape), modules=count) for shape, count in counts.items()],
            checkpoints_mb=sum(file.stat().st_size for file in bench.bases) / 1e6,
            adapter_mb=adapter_mb,
            start_s=start.seconds,
            start_mb=start.peak_mb,
            read_s=read_s,
            read_processor_s=read_processor_s,
            adapter_s=adapter_s,
            inspect_s=inspect.seconds,
            check_s=check.seconds,
            check_peak_mb=check.peak_mb,
            methods=found,
            migration_mb=sizes,
            migration_read_s=migration_read,
        )

    for method in methods:
        tick(method)
        try:
            cold = bench.over(start, bench.port(method), bench.bases)
        except RegraftError as error:
            # It can't carry this pair; what was measured of others is not lost with it.
            tick(f"{method}: not measured ({first_line(error)})")
            continue
        reference, apart = _plain(bench, method, tick)
        warm = _warm(bench, method, tick)
        found[method] = MethodSpeed(
            cold_s=cold.seconds,
            cold_processor_s=cold.processor_s,
            peak_mb=cold.peak_mb,
            reference_s=reference,
            apart=apart,
            warm_s=warm[0].seconds if warm else None,
            warm_peak_mb=warm[0].peak_mb if warm else None,
        )
        if warm is not None:
            sizes[method], migration_read[method] = warm[1:]
        keep(report())
    return report()


def _plain(bench: Bench, method: str, tick: Tick) -> tuple[float | None, float | None]:
    """Seconds of the plain way, and how far our result is from its own; None where there is none."""
    if way_of(method) is None:
        return None, None
    tick(f"{method}, the plain way")
    arguments = ["-m", "regraft.bench.speed.plain", method, *map(str, [*bench.bases, bench.lora, bench.out])]
    said = _said(arguments, bench.threads, f"the plain way of {method}")
    seconds = said["load_s"] + sum(row["modules"] * row["seconds"] for row in said["shapes"])
    return seconds, said["apart"]


def _warm(bench: Bench, method: str, tick: Tick) -> tuple[Spent, float, float] | None:
    """A port by a saved migration, the migration's MB and the seconds to read it; None where none can be made."""
    migration = bench.folder / f"{method}.migration.safetensors"
    # Half: a bench is not to drive other programs out.
    if _needed(bench, method) > psutil.virtual_memory().available / 2:
        tick(f"{method}: no room in memory to make a migration of the whole pair")
        return None
    tick(f"{method}, a migration")
    try:
        making = bench.port(method, "--save-migration", str(migration))
        spent(making, threads=bench.threads)
        tick(f"{method}, by the migration")
        by_it = ["--migration", str(migration), "-o", str(bench.out), "--overwrite", "--force"]
        # So little over the start that it is held against one of the same minute.
        start = start_of(bench.threads, bench.runs)
        found = bench.over(start, bench.command("port", *by_it, ends=False), [migration, bench.lora])
        return found, migration.stat().st_size / 1e6, reading([migration])
    except RegraftError as error:
        tick(f"{method}: no migration ({first_line(error)})")
        return None
    finally:
        migration.unlink(missing_ok=True)


def running(*, threads: int) -> RunningSpeed:
    """What the methods take that run both models, beside one pass through both.

    Raises:
        RegraftError: they can't be run here.
    """
    said = _said(["-m", "regraft.bench.speed.running", str(_N_INPUTS)], threads, "running both models")
    return RunningSpeed(n_inputs=_N_INPUTS, floor_s=said.pop("floor_s"), seconds=said)


def _said(arguments: Sequence[str], threads: int, what: str) -> dict[str, Any]:
    """What a module of this package prints, as JSON."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(threads), check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise RegraftError(f"{what} failed: {lines[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _needed(bench: Bench, method: str) -> float:
    """Bytes that making a migration of the whole pair may take, by what the projecting methods hold."""
    variant = parse_variants([method])[0]
    if variant.method not in ("lora-x", "prolora", "cross-lora", "dart"):
        return 1e9
    sides = 1 if variant.method == "lora-x" else 2
    matrices = [
        (shape[0], prod(shape[1:]))
        for name, shape in bench.pair.new.items()
        if name.endswith(".weight") and len(shape) >= 2
    ]
    # About two thirds of the directions, and with a soft edge all; in float32, and rounded to half precision beside it.
    share = 1 if "edge" in variant.options else 2 / 3
    return sides * sum((out + inp) * min(out, inp) for out, inp in matrices) * share * (4 + 2)
