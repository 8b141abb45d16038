"""The grid: every pair, adapter and seed by every control and method, cell by cell, resumable, in several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch

from regraft.bench.cells import Cell, Shelf, digest, write
from regraft.bench.controls import CONTROLS
from regraft.bench.group import Group, group_of
from regraft.bench.sources import source_of, source_of_check
from regraft.bench.variants import Variant
from regraft.bench.worlds import PairSpec, World
from regraft.errors import InputError, RegraftError, UsageError, first_line
from regraft.report.bench_schema import BenchCheck
from regraft.runtime.libraries import library

#: World → where its class is; each is made of the cache's folder.
WORLDS = {
    "language": "regraft.bench.language:LanguageWorld",
    "diffusion": "regraft.bench.diffusion:DiffusionWorld",
    "encoder": "regraft.bench.packages:PackagesWorld",
}

#: Called with (groups done, groups in all, what was done last).
Tick = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Target:
    """One pair, adapter and seed of the grid.

    Attributes:
        factory: ``module:class`` of its world.
        spec: the pair.
        adapter: its name.
        seed: that it is trained with.
    """

    factory: str
    spec: PairSpec
    adapter: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.spec.name} {self.adapter} seed {self.seed}"


@dataclass(frozen=True)
class Job:
    """What one process does: a target by all its rows."""

    target: Target
    controls: tuple[str, ...]
    variants: tuple[Variant, ...]
    cache: Path
    resume: bool
    owner: int


def open_world(factory: str, cache: Path) -> World:
    """A world of ``module:class``, made of the cache's folder."""
    module, name = factory.split(":")
    world: World = getattr(import_module(module), name)(cache)
    return world


def targets(
    cache: Path,
    pairs: Iterable[str] = (),
    adapters: Iterable[str] = (),
    seeds: Iterable[int] = (),
    worlds: Mapping[str, str] | None = None,
) -> list[Target]:
    """What is asked for, the first seeds of all pairs before the others.

    Args:
        cache: the benchmark's folder.
        pairs: names of pairs or of worlds; all by default.
        adapters: their names; all of each pair by default.
        seeds: those of each pair by default. Others are taken as they are: 100 and more are for tuning.
        worlds: by default `WORLDS`.

    Raises:
        UsageError: there is no such pair or adapter.
    """
    found = [
        (name, factory, spec)
        for name, factory in (WORLDS if worlds is None else worlds).items()
        for spec in open_world(factory, cache).pairs
    ]
    wanted, named, chosen = list(pairs), list(adapters), list(seeds)
    _check("pair", wanted, [*(spec.name for *_, spec in found), *(name for name, *_ in found)])
    here = [(factory, spec) for name, factory, spec in found if not wanted or {name, spec.name} & {*wanted}]
    # A tuning adapter may be asked for by name, though no pair reports it.
    every = [Target(f, s, adapter, seed) for f, s in here for adapter in s.adapters for seed in chosen or s.seeds]
    if named:
        extra = [name for name in named if name not in {adapter for _, s in here for adapter in s.adapters}]
        every = [t for t in every if t.adapter in named]
        every += [Target(f, s, name, seed) for name in extra for f, s in here for seed in chosen or s.seeds]
    return sorted(every, key=lambda target: target.seed)


def _check(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise UsageError(f"no {what} is named {name!r}", remedy=f"Known: {', '.join(dict.fromkeys(known))}.")


def make(cache: Path, wanted: Sequence[Target], log: Callable[[str], None]) -> None:
    """Train or fetch what is missing of some targets, in this process; an error is logged and the rest goes on."""
    for factory in dict.fromkeys(target.factory for target in wanted):
        world = open_world(factory, cache)
        for target in (target for target in wanted if target.factory == factory):
            pair, seed = target.spec.name, target.seed
            try:
                with _making(factory, cache):
                    world.adapter(pair, target.adapter, seed)
                    world.native(pair, target.adapter, seed)
                log(f"{target.name}: there")
            except Exception as error:
                log(f"{target.name}: {_line(error, cache)}")


def _making(factory: str, cache: Path) -> AbstractContextManager[Any]:
    """What is missing of a world is trained inside of this: by one process, while others wait."""
    cache.mkdir(parents=True, exist_ok=True)
    lock: AbstractContextManager[Any] = library("filelock").FileLock(cache / f".{factory.split(':')[1]}.lock")
    return lock


def run_grid(
    wanted: Sequence[Target],
    variants: Sequence[Variant],
    cache: Path,
    *,
    jobs: int = 1,
    resume: bool = False,
    controls: Sequence[str] = tuple(CONTROLS),
    tick: Tick = lambda done, total, what: None,
) -> None:
    """Fill the cache's cells. Nothing that a method or a world does ends it: errors become cells, or lines of the log.

    Args:
        wanted: see `targets`.
        variants: methods beside the controls.
        cache: the benchmark's folder.
        jobs: processes of one thread each; 0 does it all in this one.
        resume: leave cells alone that are there, of the same content, and hold no error.
        controls: of `regraft.bench.controls.CONTROLS`; at least `FEW`.
        tick: told of each group that is done.
    """
    todo = [Job(target, tuple(controls), tuple(variants), cache, resume, os.getpid()) for target in wanted]
    if jobs == 0:
        for done, job in enumerate(todo, start=1):
            run_job(job)
            tick(done, len(todo), job.target.name)
        return
    # A fresh process for each group: what one leaves behind in memory is no other's, and none of it is forked from
    # a process with threads.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload([__name__])
    running: dict[int, tuple[BaseProcess, Job]] = {}
    for done in range(1, len(todo) + 1):
        while len(running) < jobs and len(running) + done <= len(todo):
            job = todo[len(running) + done - 1]
            process = context.Process(target=run_job, args=(job,), daemon=True)
            process.start()
            running[process.sentinel] = process, job
        first: Any = wait(list(running))[0]
        process, job = running.pop(first)
        process.join()
        if process.exitcode:
            _say(cache, f"{job.target.name}: the process ended with {process.exitcode}")
        tick(done, len(todo), job.target.name)


def run_job(job: Job) -> None:
    """One group, in whatever process this is."""
    torch.set_num_threads(1)
    try:
        world = open_world(job.target.factory, job.cache)
        with group_of(world, job.target.spec, job.target.adapter, job.target.seed) as group:
            _fill(group, _shelf(group, world, job), job)
    except Exception as error:
        _say(job.cache, f"{job.target.name}: {_line(error, job.cache)}")


def _shelf(group: Group, world: World, job: Job) -> Shelf:
    """The group's place in the cache; what it depends on lies there too, for `stored`."""
    with _making(job.target.factory, job.cache):
        content = {
            "old": group.old.fingerprint,
            "new": group.new.fingerprint,
            "adapter": digest(group.trained),
            "native": digest(group.native),
            "world": getattr(world, "version", 1),
        }
    target = job.target
    shelf = Shelf(job.cache, target.spec.name, target.adapter, target.seed, content)
    shelf.folder.mkdir(parents=True, exist_ok=True)
    part = shelf.folder / f".group.{os.getpid()}"
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, shelf.folder / "group.json")
    return shelf


def stored(target: Target, cache: Path) -> Shelf | None:
    """The place of a target's cells as they were made; None where none were."""
    file = Shelf(cache, target.spec.name, target.adapter, target.seed, {}).folder / "group.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return Shelf(cache, target.spec.name, target.adapter, target.seed, content)


def dependence(row: str, variant: Variant | None = None) -> dict[str, Any]:
    """What a row's cell depends on beside its group."""
    if variant is not None:
        return {"method": variant.method, "asked": variant.asked, "source": source_of(variant.method)}
    return {"source": source_of("copy")} if "copy" in row else {}


def _fill(group: Group, shelf: Shelf, job: Job) -> None:
    rows: list[tuple[str, Variant | None]] = [(row, None) for row in job.controls]
    rows += [(variant.name, variant) for variant in job.variants]
    checks = shelf.read_check(source=source_of_check()) if job.resume else None
    if checks is None or checks.error:
        write(_checked(group, job.cache), shelf.check_file(source=source_of_check()))
    for row, variant in rows:
        _stop_if_orphaned(job.owner)
        own = dependence(row, variant)
        there = shelf.read(row, **own) if job.resume else None
        if there is not None and there.error is None:
            continue
        started = time.perf_counter()
        try:
            cell = group.control(row) if variant is None else group.method(variant)
        except Exception as error:
            cell = Cell(row=row, error=_line(error, job.cache))
        write(cell, shelf.file(row, **own))
        said = cell.error or f"{sum(cell.task) / len(cell.task):.4f}"
        _say(job.cache, f"{job.target.name}, {row}: {said} ({time.perf_counter() - started:.1f} s)")


def _checked(group: Group, cache: Path) -> BenchCheck:
    try:
        return group.checked()
    except Exception as error:
        return BenchCheck(verdict=None, error=_line(error, cache))


def _stop_if_orphaned(owner: int) -> None:
    if owner != os.getpid() and not psutil.pid_exists(owner):
        raise InputError("the run that started this was ended")


def _line(error: Exception, cache: Path) -> str:
    """One line, without files and folders: results travel, and cells of different adapters are to read alike."""
    if isinstance(error, RegraftError):
        return f"{error.key}: {error.what}" if error.key else error.what
    text = f"{type(error).__name__}: {first_line(error)}"
    return text.replace(f"{cache}{os.sep}", "").replace(str(Path.home()), "~")


def _say(cache: Path, line: str) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "bench.log").open("a", encoding="utf-8") as log:
        log.write(f"{datetime.now(timezone.utc):%m-%d %H:%M:%S} {line}\n")


def known_pairs(cache: Path, worlds: Mapping[str, str] | None = None) -> Iterator[PairSpec]:
    """Every pair of every world."""
    for factory in (WORLDS if worlds is None else worlds).values():
        yield from open_world(factory, cache).pairs
