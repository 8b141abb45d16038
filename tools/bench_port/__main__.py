"""Time and memory of a port at SD 1.5's size, beside a plain read of the same two checkpoints.

``python -m tools.bench_port --adapter tests/data/analog_svd_rank4.safetensors --cache DIR --out FILE.json``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.bench_port.sd15_size import make_pair

# What any port must do at least: bring the touched weights of both bases through memory once.
READ = """
import sys, torch
from regraft import load_adapter, open_base
from regraft.plan import source_modules
adapter = load_adapter(sys.argv[1])
for folder in sys.argv[2:]:
    base = open_base(folder)
    for module in source_modules(adapter, base):
        base.weight(module).float().sum()
"""


def timed(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MB of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with {status}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    old, new = arguments.cache / "old", arguments.cache / "new"
    if not (new / "model_index.json").exists():
        make_pair(arguments.cache)
    port = [sys.executable, "-m", "regraft", "port", str(arguments.adapter), "--from", str(old), "--to", str(new)]
    target = str(arguments.cache / "ported.safetensors")
    commands = {"read": [sys.executable, "-c", READ, str(arguments.adapter), str(old), str(new)]}
    for method in ("auto", "copy", "lora-x"):
        commands[method] = [*port, "-m", method, "--no-cache", "--overwrite", "--quiet", "--threads", "1", "-o", target]
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(arguments.runs):
        for name, command in commands.items():
            runs[name].append(timed(command))
            print(name, *(round(figure, 1) for figure in runs[name][-1]), flush=True)
    result: dict[str, Any] = {
        "command": f"python -m tools.bench_port --adapter {arguments.adapter} --cache DIR --out {arguments.out} "
        f"--runs {arguments.runs}",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "runs": arguments.runs,
        "methods": {
            name: {
                "seconds_median": round(statistics.median(second for second, _ in of), 2),
                "ratio_to_read": round(
                    statistics.median(a / b for (a, _), (b, _) in zip(of, runs["read"], strict=True)), 2
                ),
                "peak_mb": round(max(peak for _, peak in of)),
            }
            for name, of in runs.items()
        },
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
