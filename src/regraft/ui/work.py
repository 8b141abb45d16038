"""What the page has done for it, in a process of its own: each function does one job and returns its record.

A job tells what it is at by ``tick(done, total, what)``; it is stopped as a command is, by `KeyboardInterrupt`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.adapter import MODEL, Adapter
from regraft.asked import wanted_rank
from regraft.base import Base, open_base
from regraft.batch.rows import stem_of
from regraft.carry import Settings
from regraft.check import check, check_migration
from regraft.errors import OutputError, UsageError
from regraft.experts import experts, labelled
from regraft.formats import Written, load_adapter, rendered
from regraft.hardware import free_processors, use_hardware
from regraft.hub import runnable
from regraft.methods.task import Running
from regraft.output import in_utf8, write_text, write_whole
from regraft.pairing import names_of
from regraft.port import PortResult, apply_migration, fit_for
from regraft.prepare import check_understood
from regraft.report.batch_schema import BatchReport
from regraft.report.refine_schema import RefineLook, RefineReport
from regraft.report.schema import CheckReport, Picture, PortReport, VerifyReport
from regraft.ui.asked import Asked

Tick = Callable[[int, int, str], None]
#: Called with the looks of a refine until now, and the columns of pictures.
Shows = Callable[[Sequence[RefineLook], Sequence[str], Sequence[Picture]], None]

#: Prompts that are drawn where there are pictures.
PICTURES = 4


@dataclass(frozen=True)
class Made:
    """What a job has written.

    Attributes:
        record: what is told of it.
        files: the adapters, files or PEFT folders.
        page: the report.
        bases: old and new, as they were given.
        asked: what it was made of; None for a library.
        also: records of further files, such as the second expert's of a base with two.
    """

    record: Any
    bases: tuple[str, str]
    files: tuple[str, ...] = ()
    page: str = ""
    asked: Asked | None = None
    also: tuple[Any, ...] = ()

    @classmethod
    def of(cls, asked: Asked, record: Any, **more: Any) -> Made:
        """Of one adapter."""
        return cls(record, (asked.old, asked.new), asked=asked, **more)


def forecast(asked: Asked, *, probe: bool, tick: Tick) -> Made:
    """Will it survive? With ``probe``, both bases are run for it."""
    computing = use_hardware(asked.device, "float32", None)
    old, new = (open_base(path, whole=probe) for path in asked.bases)
    adapter = _read(asked.lora, old)
    running = Running(prompts=asked.prompts or None, device=asked.device) if probe else None
    record = check(adapter, old, new, asked.method, probe=running, tick=tick, **computing)
    return Made.of(asked, record)


def port(asked: Asked, *, tick: Tick) -> Made:
    """Carry it over; the record of the port, and a page with the forecast beside it."""
    from regraft.report.html import render_port

    computing = use_hardware(asked.device, "float32", None)
    old, new = (open_base(path) for path in asked.bases)
    adapter = _read(asked.lora, old)
    settings = Settings(
        strength=asked.strength,
        rank=wanted_rank(asked.rank),
        force=asked.force,
        private=asked.private,
        running=Running(prompts=asked.prompts or None, device=asked.device),
    )
    if adapter.updates:
        check_understood(adapter, old, "old", settings.selection)
    carried: list[tuple[str, PortResult, CheckReport]] = []
    for label, target in (experts(adapter, old, new) or {"": new}).items():
        running = settings.running
        migration = fit_for(adapter, old, target, asked.method, running=running, tick=tick, narrow=True, **computing)
        result = apply_migration(adapter, migration, settings, old=old, new=target, tick=tick)
        carried.append((label, result, check_migration(adapter, migration, settings.selection, old, target)))
    # Nothing is written before all of it is there, and the name is chosen last: another page may write here, too.
    stem = free_stem(asked, "ported")
    records: list[PortReport] = []
    files: list[str] = []
    for label, result, _ in carried:
        file = _write(rendered(result.adapter, asked.format or result.adapter.format), stem, label, adapter)
        files.append(str(file))
        records.append(result.report.model_copy(update={"outputs": [str(file)]}))
    page = _page(render_port(records[0], check=carried[0][2]), stem)
    return Made.of(asked, records[0], files=tuple(files), page=page, also=tuple(records[1:]))


def refine(asked: Asked, *, start: str, minutes: float, tick: Tick, shows: Shows) -> Made:
    """Bring it the rest of the way, from a port or from what `auto` makes."""
    from regraft.refine import RefineSettings, Strip
    from regraft.refine import refine as distil
    from regraft.refine.loop import Look
    from regraft.refine.state import forget, state_file
    from regraft.refine.told import look_row
    from regraft.report.refine_page import render_refine

    use_hardware(asked.device, "float32", None)
    old, new = (open_base(runnable(path)) for path in asked.bases)
    adapter = _read(asked.lora, old)
    begin = _read(start, new) if start else None
    settings = RefineSettings(
        prompts=asked.prompts or None, budget=60 * minutes if minutes else None, device=asked.device
    )
    state = state_file(adapter, old, new, begin, settings)
    looks: list[RefineLook] = []
    # A picture is told at the last look's place: how long it takes is no part of the training.
    strip = Strip(PICTURES, settings.prompts, settings.seed, lambda what: tick(*at, what))
    at = (0, 0)

    def heard(look: Look) -> None:
        nonlocal at
        at = look.step, look.most
        looks.append(look_row(look, strip.training(look)))
        tick(*at, f"{look.recovered:.1%} of what is wanted, on held-out inputs")
        shows(looks, strip.rows, strip.columns)

    result = distil(adapter, old, new, start=begin, settings=settings, state=state, tick=tick, heard=heard, strip=strip)
    stem = free_stem(asked, "refined")
    file = _write(rendered(result.adapter, asked.format or result.adapter.format), stem, "", adapter)
    forget(state)
    record: RefineReport = result.report.model_copy(update={"outputs": [str(file)]})
    return Made.of(asked, record, files=(str(file),), page=_page(render_refine(record), stem))


def measure(asked: Asked, *, ported: str, tick: Tick) -> Made:
    """Run both bases with and without their adapter, and draw where they draw."""
    from regraft.report.html import render_verify
    from regraft.verify import verify

    use_hardware(asked.device, "float32", None)
    old, new = (runnable(path) for path in asked.bases)
    record: VerifyReport = verify(
        _read(asked.lora, open_base(old)),
        _read(ported, open_base(new)),
        old,
        new,
        prompts=asked.prompts or None,
        pictures=len(asked.prompts) or PICTURES,
        device=asked.device,
        tick=tick,
    )
    return Made.of(asked, record, page=_page(render_verify(record), free_stem(asked, "measured")))


def library(folder: str, old: str, new: str, out: str, *, forecast_only: bool, tick: Tick) -> Made:
    """A whole folder, forecast or ported; see `regraft.batch`."""
    from regraft.batch import expand, run_batch
    from regraft.batch.local import LocalExecutor
    from regraft.batch.options import RowOptions
    from regraft.report.batch_page import render_batch

    for text, what in ((folder, "The folder of LoRAs"), (old, "The old base"), (new, "The new base")):
        if not text:
            raise UsageError(f"{what} is missing", remedy="Choose it.")
    use_hardware("cpu", "float32", None)
    writable(out)
    # The same folder between the same bases goes on where it was; any other has a place of its own.
    ends = hashlib.sha256("\0".join((folder, old, new)).encode("utf-8", "surrogatepass")).hexdigest()[:6]
    place = Path(out) / f"{_slug(Path(folder).name)}-to-{_slug(Path(new).name)}-{ends}"
    rows = expand([folder], old, new, RowOptions(), without=str(place))
    executor = LocalExecutor(free_processors())
    where = None if forecast_only else str(place)
    record: BatchReport = run_batch(rows, executor, out=where, check=forecast_only, tick=tick)
    page = place.with_name(f"{place.name}-{'forecast' if forecast_only else 'ported'}.html")
    # It is of this folder and these bases as they are now: what it said before is no longer so.
    write_text(in_utf8(render_batch(record)), page, overwrite=True)
    return Made(record, (old, new), page=str(page))


def _read(path: str, base: Base) -> Adapter:
    return load_adapter(Path(path), names=names_of(base), base_config=base.configs.get(MODEL))


def _page(html: str, stem: Path) -> str:
    page = stem.with_name(f"{stem.name}.html")
    write_text(in_utf8(html), page, overwrite=False)
    return str(page)


def writable(out: str | Path) -> Path:
    """The output folder, made where it is missing.

    Raises:
        OutputError: it can't be made, or not be written to.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder can't be made ({error.strerror})", file=out, remedy="Take another.") from None
    if not os.access(out, os.W_OK):
        raise OutputError("no permission to write here", file=out, remedy="Take another folder.")
    return Path(out)


def free_stem(asked: Asked, what: str) -> Path:
    """A name in the output folder that nothing has yet: ``style-ported``, then ``style-ported-2``."""
    folder = writable(asked.out)
    stem, number = f"{_slug(Path(asked.lora.split(':')[-1]).name)}-{what}", 1
    # Some disks tell no capitals apart; an expert's name comes behind a line.
    taken = {file.name.split(".")[0].casefold() for file in folder.iterdir()}
    while (name := stem if number == 1 else f"{stem}-{number}").casefold() in taken or any(
        other.startswith(f"{name.casefold()}_") for other in taken
    ):
        number += 1
    return folder / name


def _slug(name: str) -> str:
    """A file's name without its suffix and without what a disk or a shell may stumble on."""
    return re.sub(r"[^\w-]+", "-", stem_of(name)).strip("-")[:80] or "lora"


def _write(written: Written, stem: Path, label: str, adapter: Adapter) -> Path:
    path = stem.with_name(written.named(stem.name))
    path = labelled(path, label) if label else path
    write_whole(written, path, overwrite=False, source=adapter.path)
    return path
