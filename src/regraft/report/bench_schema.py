"""The record of ``regraft bench``: every pair, adapter and method beside the controls, and what they come to."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from regraft.report.schema import Forecasts, Interval, Record, Verdict, VersionedRecord

Kind = Literal["control", "method"]


class BenchRow(Record):
    """One control's or method's figures, over the seeds of one adapter, or over several adapters and pairs."""

    name: str
    kind: Kind
    recovery: Interval = Field(
        description="(score(ported) − score(none)) / (score(native) − score(none)) on the new base, signed"
    )
    versus_copy: Interval = Field(description="recovery less the copy's on the very same inputs")
    teacher_share: Interval = Field(
        description="(score(ported) − score(none)) / (score(old base + LoRA) − score(none))"
    )
    retention: Interval = Field(
        description="how much of what the new base does better than the old one is left under the adapter"
    )
    effect_cosine: Interval | None = Field(default=None, description="as `regraft verify` has it, on self-made inputs")
    effect_norm_ratio: Interval | None = None
    energy_kept: float | None = Field(default=None, description="‖ΔW ported‖² / ‖ΔW‖²: a diagnostic, not fidelity")
    extra: dict[str, float] = Field(
        default_factory=dict, description="the world's further figures, mean over seeds and adapters"
    )
    figures: dict[str, float] = Field(default_factory=dict, description="what the method measured, mean over seeds")
    seconds: float | None = Field(default=None, description="processor time of one port, on one thread")
    peak_mb: float | None = Field(default=None, description="memory that the port added at its peak, MB")
    used: str = Field(default="", description="the method that `auto` chose")
    refused: bool = Field(default=False, description="`port` refuses; what is measured was forced")
    errors: list[str] = Field(default_factory=list, description="what stopped the port or the score")

    @property
    def missing(self) -> bool:
        """Whether nothing could be scored."""
        return self.recovery.mean is None and bool(self.errors)


class BenchCheck(Record):
    """What `regraft check` says of one adapter before any model is run, mean over seeds."""

    verdict: Verdict | None
    summary: str = ""
    similarity: float | None = None
    distance: float | None = None
    adapter_distance: float | None = None
    forecast: Forecasts = Forecasts()
    numbers: int | None = Field(default=None, description="that the adapter was trained with")
    seconds: float | None = None
    error: str | None = None


class BenchSeed(Record):
    """One adapter on one pair, as one seed's training made it."""

    seed: int
    native_gain: Interval
    teacher: Interval
    home: Interval | None = None
    check: BenchCheck
    rows: list[BenchRow]


class BenchAdapter(Record):
    """One adapter on one pair: the mean over its seeds."""

    name: str
    seeds: list[int]
    native_gain: Interval = Field(description="score(native) − score(none), in the world's own unit")
    teacher: Interval = Field(description="the old base + LoRA's score less score(none), in the same unit")
    home: Interval | None = Field(default=None, description="the old base + LoRA's score less the old base's alone")
    check: BenchCheck
    rows: list[BenchRow]
    by_seed: list[BenchSeed] = Field(default_factory=list, description="where there are several seeds: each one's own")


class BenchPair(Record):
    """One pair of bases: its adapters, and their mean."""

    name: str
    world: str
    relation: str
    expects: str
    about: str
    adapters: list[BenchAdapter]
    rows: list[BenchRow]
    missing: int = Field(default=0, description="cells that were asked for and are not in the cache")


class BenchGroup(Record):
    """Pairs of one world that one goal applies to."""

    name: str
    world: str
    expects: str
    pairs: list[str]
    rows: list[BenchRow]


class BenchMethod(Record):
    """How a row's port was asked for."""

    name: str
    method: str
    options: dict[str, Any] = Field(default_factory=dict)


class BenchRun(Record):
    """One run of the benchmark, and the pairs whose figures are its."""

    command: str
    date: str
    versions: dict[str, str]
    seconds: float = Field(
        description="processor time of the ports and of their scores; training, loading and effects left out"
    )
    pairs: list[str]


class BenchReport(VersionedRecord):
    """``regraft bench --json``."""

    runs: list[BenchRun] = Field(description="oldest first; more than one where pairs were kept from an earlier record")
    methods: list[BenchMethod]
    groups: list[BenchGroup]
    pairs: list[BenchPair]

    @property
    def missing(self) -> int:
        """Cells that were asked for and are not there."""
        return sum(pair.missing for pair in self.pairs)
