"""Adapters per second of `regraft batch`, beside the floor, with one and two workers, and with workers killed.

``python -m tools.bench_batch --cache DIR --out results/batch.json [--page docs/batch.md]``

The record is written after each part, and parts that it has are not measured again: a bench that was stopped goes on.
Each part says when and by which version it was measured; ``date`` and ``regraft_version`` of the record are the last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tools.bench_batch.library import Library, make_full_size, make_small
from tools.bench_batch.measure import floor, run
from tools.bench_batch.on_paper import WORKERS, measured, on_paper
from tools.bench_batch.page import page

from regraft import __version__

#: Parts of a library's record, in the order in which they are measured.
PARTS = ("workers_1", "workers_2", "killed")
_LONGEST_INTERVAL = 20.0


def interval(alone: dict[str, Any], asked: float | None) -> float:
    """How often a worker is killed: as asked, or a fifth of the time that one worker's rows took, at most 20 s.

    Two workers take half of that time or more, so that some are killed in a small library, too.
    """
    return asked if asked is not None else round(min(_LONGEST_INTERVAL, alone["rows_seconds"] / 5), 2)


def measure_part(
    part: str, found: dict[str, Any], library: Library, place: Path, kill_every: float | None
) -> dict[str, Any]:
    """What a part adds to the record of its library.

    Args:
        part: of `PARTS`.
        found: the record so far.
        library: its bases and its folder.
        place: for outputs.
        kill_every: seconds; None for the default.
    """
    pair, loras = library
    out = place / "out"
    if part == "killed":
        every = interval(found["workers_1"], kill_every)
        done = run(pair, loras, out, jobs=2, kill_every=every)
        return {"killed": {**done, "every_s": every, "nothing_lost_nothing_twice": verdict(done, found)}}
    done = run(pair, loras, out, jobs=int(part[-1]))
    return {part: {**done, **rates(found["adapters"], done)}} | (
        {"floor": floor(loras, out, place / "copied")} if part == "workers_1" else {}
    )


def rates(count: int, done: dict[str, Any]) -> dict[str, float]:
    """Adapters per second over all, and without start-up, fit and what comes after the rows."""
    return {
        "adapters_per_second": round(count / done["seconds"], 3),
        "adapters_per_second_of_rows": round(count / done["rows_seconds"], 3),
    }


def verdict(done: dict[str, Any], found: dict[str, Any]) -> bool | None:
    """Whether the output is what it is undisturbed, with one row an adapter; None where no worker was killed."""
    if not done["kills"]:
        return None
    once = done["rows"] == done["keys"] == found["adapters"]
    return once and not done["given_up"] and done["content"] == found["workers_2"]["content"]


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """What the parts come to, as far as they are there: efficiency, and how many times the floor's seconds."""
    told: dict[str, Any] = {}
    one, two = (found.get(part) for part in PARTS[:2])
    if one and two:
        told["efficiency_2_workers"] = {
            "over_all": round(one["seconds"] / two["seconds"] / 2, 3),
            "of_rows": round(one["rows_seconds"] / two["rows_seconds"] / 2, 3),
        }
    for part in PARTS[:2]:
        if part in found:
            told.setdefault("times_the_floor", {})[part] = {
                "over_all": round(found[part]["seconds"] / found["floor"]["seconds"], 2),
                "of_rows": round(found[part]["rows_seconds"] / found["floor"]["seconds"], 2),
            }
    return told


def stamp() -> dict[str, str]:
    """When and by what something is measured."""
    return {"date": date.today().isoformat(), "regraft_version": __version__}


def keep_stamps(record: dict[str, Any]) -> None:
    """Give parts that don't say when they were measured what the record says, before that is overwritten."""
    known = {name: record[name] for name in stamp() if name in record}
    for library in ("reduced", "full_size"):
        found = record.get(library, {})
        for part in PARTS:
            if part in found:
                found[part] = {**known, **found[part]}


def measure_library(
    record: dict[str, Any], name: str, count: int, make: Callable[[Path, int], Library], asked: argparse.Namespace
) -> None:
    """Measure the parts of a library that a record lacks, writing the record after each."""
    found = record.get(name, {})
    if found.get("adapters") != count:
        found = {"adapters": count}
    record[name] = found
    missing = [part for part in PARTS if part not in found]
    if not missing:
        return
    keep_stamps(record)
    place = asked.cache.absolute()
    place.mkdir(parents=True, exist_ok=True)
    library = make(place, count)
    for part in missing:
        found |= measure_part(part, found, library, place, asked.kill_every)
        found[part] |= stamp()
        found |= compared(found)
        print(f"{count} adapters, {part}: {found[part]['seconds']:.1f} s", flush=True)
        write(record, asked)
    shutil.rmtree(place / "out")


def write(record: dict[str, Any], asked: argparse.Namespace) -> None:
    """Write the record with where and how it was made, and what it comes to on paper."""
    options = {"--adapters": asked.adapters, "--full-size": asked.full_size}
    options |= {"--kill-every": asked.kill_every} if asked.kill_every is not None else {}
    words = " ".join(f"{option} {value:g}" for option, value in options.items())
    record |= {
        "command": f"python -m tools.bench_batch --cache DIR --out {asked.out.name} {words}",
        **stamp(),
        "machine": {
            "processor": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
        },
    }
    there = [record[name] for name in ("full_size", "reduced") if "workers_2" in record.get(name, {})]
    if there:
        found = measured(*there)
        record["on_paper"] = [on_paper(found, workers=workers) for workers in WORKERS]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="for bases and libraries, which are made once")
    parser.add_argument("--out", type=Path, required=True, help="the record, such as results/batch.json")
    parser.add_argument("--adapters", type=int, default=10_000, help="at reduced size, of mixed formats and kinds")
    parser.add_argument("--full-size", type=int, default=200, help="at SD 1.5's true size, rank 8")
    parser.add_argument(
        "--kill-every",
        type=float,
        metavar="SECONDS",
        help="by default a fifth of the time that one worker's rows took, at most 20",
    )
    parser.add_argument("--page", type=Path, help="write the figures into docs/batch.md")
    asked = parser.parse_args()
    record = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    # 0 leaves a library out, or as it was measured before.
    for name, count, make in (
        ("reduced", asked.adapters, make_small),
        ("full_size", asked.full_size, make_full_size),
    ):
        if count:
            measure_library(record, name, count, make, asked)
    if asked.page:
        asked.page.write_text(page(asked.page.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    main()
