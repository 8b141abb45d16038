"""``python -m tools.fuzz TARGET… --inputs N``: see the README beside this file."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

from tools.fuzz import running
from tools.fuzz.targets import TARGETS


def add(path: Path, name: str, outcome: running.Outcome, seconds: float, command: str) -> None:
    """Add one run's counts to a results file."""
    known = json.loads(path.read_text()) if path.is_file() else {"inputs": 0, "targets": {}}
    row = known["targets"].setdefault(
        name, {"inputs": 0, "read": 0, "told": 0, "seconds": 0, "findings": [], "runs": []}
    )
    row["inputs"] += outcome.inputs
    row["read"] += outcome.read
    row["told"] += outcome.told
    row["seconds"] = round(row["seconds"] + seconds)
    row["slowest_input_s"] = round(max(outcome.slowest, row.get("slowest_input_s", 0)), 3)
    row["findings"] = sorted({*row["findings"], *outcome.findings})
    row["runs"].append(command)
    known["inputs"] = sum(other["inputs"] for other in known["targets"].values())
    path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    """Run the targets; 1 where one had a finding."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--inputs", type=int, default=2000, help="for each target")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each target, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a results file to add the counts to")
    parser.add_argument("--findings", type=Path, help="a folder for the inputs that broke a reader")
    given = parser.parse_args()
    running.limit()
    bad = 0
    for name in given.targets or TARGETS:
        started = time.monotonic()
        outcome = running.run(TARGETS[name], given.inputs, given.seed, given.seconds)
        seconds = time.monotonic() - started
        counts = f"{outcome.inputs} inputs, {outcome.read} read, {outcome.told} told"
        bad_ones = f"{len(outcome.findings)} findings, {sum(outcome.netted.values())} in the last net"
        print(f"{name}: {counts}, {bad_ones}, slowest {outcome.slowest:.2f} s, {seconds:.0f} s", flush=True)
        for line, count in outcome.netted.most_common(12):
            print(f"  net {count}: {line}")
        for line, data in outcome.findings.items():
            bad += 1
            print(f"  FOUND {line}")
            if given.findings:
                given.findings.mkdir(parents=True, exist_ok=True)
                (given.findings / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
        if given.out:
            command = f"python -m tools.fuzz {name} --inputs {given.inputs} --seed {given.seed}"
            add(given.out, name, outcome, seconds, command)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
