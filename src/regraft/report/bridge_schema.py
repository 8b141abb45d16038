"""The records of ``regraft bridge run`` and ``regraft bridge train``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.report.schema import BaseSummary, Record, VersionedRecord
from regraft.report.train_schema import TrainLook


class BridgedText(Record):
    """What follows one prompt."""

    prompt: str
    new: str = Field(description="by the new base alone")
    bridged: str


class BridgeReport(VersionedRecord):
    """``regraft bridge run --json``."""

    adapter: str
    source: str
    target: str
    model_class: str = Field(description="of the new base")
    unit: Literal["texts", "pictures"]
    way: str = Field(description="how the old base's effect reaches the new one")
    strength: float | tuple[float, float] = Field(description="λ; or λ at the beginning of the sampling and at its end")
    mix: float | None = Field(default=None, description="the adapter's part of a mixture before anything is read")
    seed: int
    prompts: list[str]
    texts: list[BridgedText] = Field(default_factory=list)
    outputs: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    seconds: float


class MapperLevel(Record):
    """One level of a mapper."""

    old: str = Field(description="block of the old denoiser")
    new: str = Field(description="block of the new one that hears of it")
    inner: int = Field(description="channels of the old block")
    outer: int = Field(description="channels of the new block")
    grows: bool = Field(description="its first residual block doubles the size")


class BridgeTrainReport(VersionedRecord):
    """``regraft bridge train --json``."""

    source: BaseSummary
    target: BaseSummary
    outputs: list[str]
    data: str = Field(description="what was learnt from")
    learnt: int = Field(description="pictures, in all their versions")
    levels: list[MapperLevel]
    fusion: str
    trained: int = Field(description="numbers that were trained")
    batch: int
    rate: float
    steps: int
    stopped: str
    unkept: str = Field(default="", description="why the state of the training could not be kept on disk")
    looks: list[TrainLook]
    seconds: float
    peak_mb: float
