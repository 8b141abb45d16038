"""``python -m tools.kill_test --kills 1000 --out results/kills.json``: see the README beside this file."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.kill_test.scenarios import SCENARIOS, Scenario, content, prepare, run, set_old, stages


def kill_once(scenario: Scenario, delay: float, *, while_writing: bool) -> bool:
    """Run the command in a fork of this process and kill it; False where it was through before.

    Args:
        scenario: the command.
        delay: seconds from the start, or from the first moment of writing.
        while_writing: wait for that moment.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        if while_writing:
            _tell_of_writing(writer)
        else:
            os.write(writer, b"s")
        os._exit(run(scenario))
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as told:
        # An empty answer: the command was through without writing.
        told.read(1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"{scenario.name}: the command itself failed ({os.WEXITSTATUS(status)})")
    return os.WIFSIGNALED(status)


def _tell_of_writing(writer: int) -> None:
    made = tempfile.mkdtemp

    def tell(*args: Any, **kwargs: Any) -> str:
        os.write(writer, b"w")
        return made(*args, **kwargs)

    tempfile.mkdtemp = tell  # type: ignore[assignment]


def timed(scenario: Scenario) -> tuple[float, float]:
    """Seconds of an undisturbed run: in all, and from the first moment of writing."""
    reader, writer = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if not child:
        _tell_of_writing(writer)
        os._exit(run(scenario))
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as told:
        told.read(1)
        writing = time.perf_counter()
        _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"{scenario.name}: the command itself failed")
    ended = time.perf_counter()
    return ended - started, ended - writing


def test(scenario: Scenario, kills: int, dice: random.Random) -> dict[str, Any]:
    """Kill one command ``kills`` times; what was found under the outputs' names each time."""
    place = Path.cwd()
    set_old(place, scenario)
    old = {name: content(place / name) for name in scenario.outputs}
    whole, writing = timed(scenario)
    new = {name: content(place / name) for name in scenario.outputs}
    found: Counter[str] = Counter()
    done = leftover = 0
    while done < kills:
        set_old(place, scenario)
        aimed = dice.random() < 0.8
        if not kill_once(scenario, dice.uniform(0, 1.05 * (writing if aimed else whole)), while_writing=aimed):
            found["through before the kill"] += 1
            continue
        done += 1
        for name in scenario.outputs:
            now = content(place / name)
            found["old whole" if now == old[name] else "new whole" if now == new[name] else "BROKEN"] += 1
        left = list(stages(place))
        leftover += bool(left)
        # With what killed runs left behind beside it, the same command must still work.
        if left and done % 20 == 0:
            timed(scenario)
            assert {name: content(place / name) for name in scenario.outputs} == new
        for stage in left:
            shutil.rmtree(stage, ignore_errors=True)
    return {
        "command": " ".join(("regraft", *scenario.argv, "--overwrite")),
        "kills": done,
        "kills_that_left_a_hidden_folder": leftover,
        "outputs": dict(sorted(found.items())),
        "seconds_of_a_run": round(whole, 3),
        "seconds_of_its_writing": round(writing, 3),
    }


def main(kills: int, seed: int = 0, names: Sequence[str] = ()) -> dict[str, Any]:
    """Kill every command (or those of ``names``) its share of ``kills`` times, in a temporary folder."""
    # Imported once: every fork begins where the command's own work does.
    from importlib import import_module

    from regraft.cli import VERBS

    for verb in VERBS:
        import_module(f"regraft.cli.{verb}")
    dice = random.Random(seed)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            prepare(Path(place))
            chosen = [scenario for scenario in SCENARIOS if not names or scenario.name in names]
            shares = [kills // len(chosen) + (i < kills % len(chosen)) for i in range(len(chosen))]
            rows = {s.name: test(s, share, dice) for s, share in zip(chosen, shares, strict=True)}
        finally:
            os.chdir(here)
    only = "".join(f" --only {name!r}" for name in names)
    return summed([f"python -m tools.kill_test --kills {kills} --seed {seed}{only}"], rows)


def summed(commands: list[str], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The record of the rows of one or several runs."""
    return {
        "commands": commands,
        "platform": sys.platform,
        "kills": sum(row["kills"] for row in rows.values()),
        "broken": sum(row["outputs"].get("BROKEN", 0) for row in rows.values()),
        "by_command": rows,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.kill_test", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this command; repeatable")
    parser.add_argument("--out", type=Path, help="a results file; what it holds of other commands stays in it")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result = main(given.kills, given.seed, given.only)
    if given.out and given.out.is_file():
        before = json.loads(given.out.read_text())
        rows = {**before["by_command"], **result["by_command"]}
        result = summed([*before["commands"], *result["commands"]], rows)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if given.out:
        given.out.write_text(text)
    print(text)
    sys.exit(bool(result["broken"]))
