"""One input to one reader, and what came of it."""

from __future__ import annotations

import resource
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from types import FrameType

from tools.fuzz.targets import Target

from regraft.errors import RegraftError

#: No input of a few KB may take longer (of this process's own time; of the clock's, for one that waits), or more memory
#: beyond what the libraries take themselves.
SECONDS, WAITING, MEMORY = 5, 60, 1 << 30


class TooSlow(Exception):
    """An input held a reader for longer than `SECONDS`."""


@dataclass
class Outcome:
    """What came of many inputs.

    Attributes:
        inputs: how many were given.
        read: how many were read.
        told: how many were told as an error of ours.
        netted: place in our code → how many fell into the last net (`regraft.errors.understanding`).
        findings: the input and what it did, for each new place where it did it.
        slowest: seconds of the slowest input.
    """

    inputs: int = 0
    read: int = 0
    told: int = 0
    netted: Counter[str] = field(default_factory=Counter)
    findings: dict[str, bytes] = field(default_factory=dict)
    slowest: float = 0.0


def limit(memory: int | None = MEMORY) -> None:
    """Make a hang and (where ``memory`` is given, for good in this process) a bomb show themselves as exceptions."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGPROF, late)
    if sys.platform == "linux" and memory is not None:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))


def try_input(target: Target, data: bytes, outcome: Outcome) -> str | None:
    """Give one input; the line of a finding, or None."""
    outcome.inputs += 1
    started = time.process_time()
    signal.alarm(WAITING)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.read(data)
        outcome.read += 1
    except RegraftError as error:
        outcome.told += 1
        if error.__cause__ is not None and error.what.startswith("is a damaged "):
            outcome.netted[_place(error.__cause__)] += 1
        if "\n" in str(error) or not str(error) or len(str(error)) > 3000:
            return _found(outcome, f"not one line: {str(error)[:80]!r}", data)
    except (Exception, TooSlow, MemoryError) as error:
        return _found(outcome, _place(error), data)
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome.slowest = max(outcome.slowest, time.process_time() - started)
    return None


def _found(outcome: Outcome, line: str, data: bytes) -> str:
    outcome.findings.setdefault(line, data)
    return line


def _place(error: BaseException) -> str:
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "regraft" in f.filename]
    where = f"{ours[-1].filename.rpartition('regraft/')[2]}:{ours[-1].lineno}" if ours else "?"
    text = str(error).splitlines()[0][:90] if str(error) else ""
    return f"{type(error).__name__} at {where}: {text}"


def mutated(target: Target, seeds: list[bytes], dice: Random) -> bytes:
    """A broken input: a seed, changed once or several times."""
    data = dice.choice(seeds)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 5))):
        data = target.mutate(data, dice)
    return data


def run(target: Target, inputs: int, seed: int, seconds: float = float("inf")) -> Outcome:
    """Give ``inputs`` broken inputs made from ``seed``, the same every time, for ``seconds`` at most."""
    outcome, dice, seeds = Outcome(), Random(seed), target.seeds()
    for data in seeds:
        # The first read of all loads the families' tables, which no input is to blame for.
        with suppress(RegraftError):
            target.read(data)
        try_input(target, data, outcome)
    ends = time.monotonic() + seconds
    while outcome.inputs < inputs and time.monotonic() < ends:
        try_input(target, mutated(target, seeds, dice), outcome)
    return outcome
