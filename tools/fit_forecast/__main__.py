"""Refit the forecast, and print how good it is on pairs that it has not seen.

With ``--cache``, the measured ports come from ``results/bench.json`` and the figures from the bases and adapters in the
benchmark's cache; without it, both are those of the calibration that ships. Either way the calibration is written anew.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from regraft.forecast.calibration import STAGES, Calibration, has_offset, table_of
from regraft.forecast.features import FIGURES
from regraft.forecast.fitting import Held, Score, leave_one_pair_out, score
from regraft.forecast.rows import Row
from regraft.forecast.verdict import FLOOR

from .measured import rows_of_bench

_ROOT = Path(__file__).parents[2]
_BENCH = _ROOT / "results" / "bench.json"
_OUT = _ROOT / "src" / "regraft" / "forecast" / "calibration.json"


def main() -> None:
    """Parse, fit, write, print."""
    parser = argparse.ArgumentParser(prog="python -m tools.fit_forecast", description=__doc__)
    parser.add_argument("--bench", type=Path, default=_BENCH, help="the benchmark's record")
    parser.add_argument("--cache", type=Path, help="the benchmark's cache, to measure the figures anew")
    parser.add_argument("--rows", type=Path, nargs="*", default=[], help="further rows, as the calibration holds them")
    parser.add_argument("--out", type=Path, default=_OUT)
    parser.add_argument("--dry-run", action="store_true", help="print the scores, write nothing")
    parser.add_argument("--show", nargs="*", metavar="WAY", default=[], help="print every held-out forecast of a way")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(_OUT.read_text(encoding="utf-8"))
    if args.cache is not None:
        rows = list(rows_of_bench(args.bench, args.cache))
        command = "python -m tools.fit_forecast --cache DIR"
    else:
        rows, command = [Row.of(row) for row in known["rows"]], known["made"].get("command", "")
    rows += [Row.of(row) for file in args.rows for row in json.loads(file.read_text(encoding="utf-8"))]
    calibration = Calibration.fitted(rows, made(command))
    if not args.dry_run:
        text = json.dumps(calibration.record(), indent=1, ensure_ascii=False) + "\n"
        args.out.write_text(text, encoding="utf-8")
    report(calibration, args.show)


def made(command: str) -> dict[str, str]:
    """How a calibration was made."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "regraft": version("regraft"),
        "judged by": "python -m tools.fit_forecast --dry-run",
    }


def report(calibration: Calibration, show: list[str]) -> None:
    """Print the scores of every way and stage, and what is asked for one by one."""
    print(f"{'way':18} {'stage':12} pairs adapters  Spearman   MAE   held  refusals right  wrongly refused")
    for way, stage in sorted(calibration.fits, key=lambda key: (key[0], STAGES.index(key[1]))):
        held = leave_one_pair_out(
            table_of(calibration.rows, way, stage).rows, way, FIGURES[stage], offset=has_offset(way, stage)
        )
        print(line(way, stage, score(held, FLOOR)))
        if way in show:
            print("\n".join(f"  {one_by_one(one)}" for one in held))


def line(way: str, stage: str, found: Score) -> str:
    """One row of the table."""
    return (
        f"{way:18} {stage:12} {found.pairs:5} {found.adapters:8} {found.spearman:9.2f} {found.error:5.2f} "
        f"{found.held:6.0%} {found.refusals:15.0%} {found.wrongly_refused:16.0%}"
    )


def one_by_one(held: Held) -> str:
    """One held-out forecast."""
    return (
        f"{held.row.pair} {held.row.adapter}: measured {held.measured:.2f}, forecast {held.expected:.2f} "
        f"({held.low:.2f} to {held.high:.2f})"
    )


if __name__ == "__main__":
    main()
