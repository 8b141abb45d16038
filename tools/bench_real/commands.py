"""regraft by its own command line, as a user runs it."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import regraft
from regraft import cli

#: A name for each row → the options of `regraft port`.
METHODS: dict[str, list[str]] = {
    "copy": ["-m", "copy"],
    "auto": ["-m", "auto"],
    "lora-x, half rank": ["-m", "lora-x", "--subspace-rank", "0.5"],
    "lora-x, energy 0.9": ["-m", "lora-x"],
    "prolora, half rank": ["-m", "prolora", "--subspace-rank", "0.5"],
    "prolora, energy 0.9": ["-m", "prolora"],
    "procrustes": ["-m", "procrustes"],
}


@dataclass(frozen=True)
class Ran:
    """What one command left: exit code, its record (or None), the last line of its errors, seconds of processor time.

    Wall time would tell more of what else the machine was at than of the command.
    """

    code: int
    record: dict[str, Any] | None
    error: str
    seconds: float


def run(*arguments: str | Path) -> Ran:
    """``python -m regraft ARGUMENTS --json`` on one thread."""
    started = _children()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "regraft", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return _ran(arguments, done.returncode, done.stdout, done.stderr, _children() - started)


def forked(*arguments: str | Path) -> Ran:
    """The same in a fork of this process, which saves each of many short commands the imports."""
    _import_all()
    started = _children()
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder) / "stdout", Path(folder) / "stderr"
        process = multiprocessing.get_context("fork").Process(target=_main, args=(list(map(str, arguments)), streams))
        process.start()
        process.join()
        output, errors = (stream.read_text(encoding="utf-8") for stream in streams)
    return _ran(arguments, process.exitcode or 0, output, errors, _children() - started)


@cache
def _import_all() -> None:
    for module in pkgutil.walk_packages(regraft.__path__, "regraft."):
        if module.name != "regraft.__main__":
            importlib.import_module(module.name)


def _main(arguments: list[str], streams: tuple[Path, Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["regraft", *arguments, "--json"]
    cli.main()


def _children() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _ran(arguments: tuple[str | Path, ...], code: int, output: str, errors: str, seconds: float) -> Ran:
    try:
        record = json.loads(output)
    except json.JSONDecodeError:
        record = None
    error = (errors.strip().splitlines() or [""])[-1]
    for path in arguments:
        # Results travel: nobody's folders with them.
        error = error.replace(str(path), path.name) if isinstance(path, Path) else error
    return Ran(code, record, error, seconds)


Runner = Callable[..., Ran]


def port(adapter: Path, old: Path, new: Path, out: Path, options: Sequence[str], runner: Runner = run) -> Ran:
    """``regraft port``; the cache of migrations is left out, so that seconds are those of a first run."""
    return runner("port", adapter, "--from", old, "--to", new, "-o", out, "--overwrite", "--no-cache", *options)


def check(adapter: Path, old: Path, new: Path, runner: Runner = run) -> Ran:
    """``regraft check``."""
    return runner("check", adapter, "--from", old, "--to", new)


def verify(original: Path, ported: Path, old: Path, new: Path, *options: str) -> Ran:
    """``regraft verify``."""
    return run("verify", original, ported, "--from", old, "--to", new, *options)
