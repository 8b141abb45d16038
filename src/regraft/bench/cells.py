"""One cell of the grid: what one control or method came to on one pair, adapter and seed. A JSON file in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from regraft.bench.worlds import Scores
from regraft.report.bench_schema import BenchCheck
from regraft.report.schema import Interval

#: Rises when scores, controls or ports are made in another way, so that older cells no longer count.
VERSION = 1

M = TypeVar("M", bound=BaseModel)


class Cell(BaseModel):
    """What one row came to; without scores where `error` says why.

    Attributes:
        row: name of the control or method variant.
        task: one score per test input.
        retention: one score per retention input.
        extra: the world's further figures.
        figures: what the method measured on its way.
        effect_cosine: of its effect on the new base with the original's on the old one.
        effect_norm_ratio: likewise.
        energy_kept: mean over modules, weighted by their share of ‖ΔW‖².
        seconds: processor time of the port.
        scored_in: processor time of the score.
        peak_mb: memory that the port added at its peak.
        used: method that carried it in the end.
        refused: the verdict was a refusal, and the port was forced.
        error: why there is no score.
    """

    row: str
    task: list[float] = Field(default_factory=list)
    retention: list[float] = Field(default_factory=list)
    extra: dict[str, float] = Field(default_factory=dict)
    figures: dict[str, float] = Field(default_factory=dict)
    effect_cosine: Interval | None = None
    effect_norm_ratio: Interval | None = None
    energy_kept: float | None = None
    seconds: float | None = None
    scored_in: float | None = None
    peak_mb: float | None = None
    used: str = ""
    refused: bool = False
    error: str | None = None

    @property
    def scores(self) -> Scores | None:
        """The scores as arrays; None where there are none."""
        if self.error is not None or not self.task:
            return None
        return Scores(np.array(self.task), np.array(self.retention), self.extra)

    def scored(self, scores: Scores) -> Cell:
        """The same with scores, rounded to what a file needs."""
        task, retention = ([float(f"{value:.7g}") for value in part] for part in (scores.task, scores.retention))
        extra = {name: float(f"{value:.7g}") for name, value in scores.extra.items()}
        return self.model_copy(update={"task": task, "retention": retention, "extra": extra})


class Shelf:
    """The cells of one pair, adapter and seed in the cache.

    Args:
        folder: of the cache.
        pair: its name.
        adapter: its name.
        seed: that it was trained with.
        content: what the cells' content depends on, beside each row's own.
    """

    def __init__(self, folder: Path, pair: str, adapter: str, seed: int, content: Mapping[str, Any]) -> None:
        self.folder = folder / "cells" / pair / f"{adapter}-s{seed}"
        self.content = {"version": VERSION, "pair": pair, "adapter": adapter, "seed": seed, **content}

    def file(self, row: str, **own: Any) -> Path:
        """Where a row's cell lies; ``own`` is what its content depends on."""
        text = json.dumps({**self.content, "row": row, **own}, sort_keys=True, default=str)
        slug = re.sub(r"[^a-z0-9.]+", "-", row.lower()).strip("-")
        return self.folder / f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def read(self, row: str, **own: Any) -> Cell | None:
        """A row's cell; None where it is not there, or damaged."""
        return read(self.file(row, **own), Cell)

    def check_file(self, **own: Any) -> Path:
        return self.file("check", **own)

    def read_check(self, **own: Any) -> BenchCheck | None:
        return read(self.check_file(**own), BenchCheck)


def read(file: Path, kind: type[M]) -> M | None:
    """What a file holds; None where it is not there, or no such thing."""
    try:
        return kind.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def write(content: BaseModel, file: Path) -> None:
    """Whole or not at all: a kill leaves no half of a cell."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(content.model_dump_json(exclude_defaults=True), encoding="utf-8")
    os.replace(part, file)


def digest(path: Path) -> str:
    """SHA-256 of an adapter: a file, or the weights and config in a folder."""
    files = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".json")) if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in files:
        # What training noted beside the weights (seconds, losses) is no part of the adapter.
        if file.name != "training.json":
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()
