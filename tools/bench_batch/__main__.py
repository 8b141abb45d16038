"""Adapters per second of `regraft batch`, beside the floor, with one and two workers, and with workers killed.

``python -m tools.bench_batch --cache DIR --out results/batch.json [--adapters 10000] [--full-size 200]``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from tools.bench_batch.library import make_full_size, make_small
from tools.bench_batch.measure import floor, run


def measured(pair: tuple[Path, Path], loras: Path, place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one library."""
    count = sum(1 for file in loras.iterdir())
    found: dict[str, Any] = {"adapters": count}
    rates: dict[int, float] = {}
    for jobs in (1, 2):
        done = run(pair, loras, place / "out", jobs=jobs)
        rates[jobs] = count / done["seconds"]
        found[f"workers_{jobs}"] = {**done, "adapters_per_second": round(rates[jobs], 2)}
        print(f"{count} adapters, {jobs} workers: {rates[jobs]:.2f} a second", flush=True)
        if jobs == 1:
            found["floor"] = floor(loras, place / "out", place / "copied")
            found["floor"]["adapters_per_second"] = round(count / found["floor"]["seconds"], 2)
    found["efficiency_2_workers"] = round(rates[2] / rates[1] / 2, 3)
    reference = found["workers_2"]["content"]
    done = run(pair, loras, place / "out", jobs=2, kill_every=arguments.kill_every)
    same = done["content"] == reference and done["rows"] == done["keys"] == count
    found["killed"] = {**done, "every_s": arguments.kill_every, "nothing_lost_nothing_twice": same}
    shutil.rmtree(place / "out")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapters", type=int, default=10_000, help="at reduced size, of mixed formats")
    parser.add_argument("--full-size", type=int, default=200, help="at SD 1.5's true size, rank 8; 0 leaves them out")
    parser.add_argument("--kill-every", type=float, default=20.0, metavar="SECONDS")
    arguments = parser.parse_args()
    place = arguments.cache.absolute()
    place.mkdir(parents=True, exist_ok=True)
    given = {"--adapters": arguments.adapters, "--full-size": arguments.full_size, "--kill-every": arguments.kill_every}
    words = [f"{name} {value:g}" for name, value in given.items()]
    result: dict[str, Any] = {
        "command": f"python -m tools.bench_batch --cache DIR --out {arguments.out.name} {' '.join(words)}",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": sys.version.split()[0]},
    }
    result["reduced"] = measured(*make_small(place, arguments.adapters), place, arguments)
    if arguments.full_size:
        result["full_size"] = measured(*make_full_size(place, arguments.full_size), place, arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
