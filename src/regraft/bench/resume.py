"""Training that can be cut off at any moment and goes on where it was."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class Checkpoints:
    """A loop over steps that saves every `every` steps and starts from the last save.

    What is drawn at random in a step depends on the seed and the step alone (`batch_indices`,
    `step_generator`), so a run that was cut off ends as an unbroken one does.
    """

    def __init__(self, path: Path, every: int, log: Path) -> None:
        self.path, self.every, self.log = path, every, log
        self._sums: dict[str, float] = {}
        self._count = 0
        self._since = time.monotonic()

    def steps(self, total: int, parts: dict[str, Any]) -> Iterator[int]:
        """Yield the steps still to do; `parts` have state_dict and load_state_dict."""
        first = 0
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            first = saved.pop("step")
            for name, state in saved.items():
                parts[name].load_state_dict(state)
        for step in range(first, total):
            yield step
            if (step + 1) % self.every == 0 or step + 1 == total:
                # Written beside and renamed: a run that is killed here keeps its older checkpoint.
                beside = self.path.with_suffix(".part")
                torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}, beside)
                os.replace(beside, self.path)

    def note(self, step: int, every: int = 50, **figures: float) -> None:
        """Append the means of the last `every` steps to the log, as one JSON line."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if (step + 1) % every == 0:
            seconds = (time.monotonic() - self._since) / self._count
            line = {"step": step + 1, "seconds_per_step": round(seconds, 3)}
            line |= {name: round(value / self._count, 5) for name, value in self._sums.items()}
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._sums, self._count, self._since = {}, 0, time.monotonic()


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step of one run."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def batch_indices(seed: int, step: int, batch: int, count: int) -> torch.Tensor:
    """Which of `count` pictures the step trains on."""
    return torch.randint(count, (batch,), generator=step_generator(seed, step))


def cosine_rate(step: int, total: int, warmup: int, floor: float = 0.02) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a half cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
