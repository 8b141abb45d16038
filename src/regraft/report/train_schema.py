"""The record of ``regraft train``."""

from __future__ import annotations

from pydantic import Field

from regraft.report.schema import BaseSummary, Record, VersionedRecord


class TrainLook(Record):
    """How it stood after some steps."""

    step: int
    loss: float | None = Field(default=None, description="mean of the steps since the look before")
    held: float | None = Field(default=None, description="mean on data that nothing was learnt from")
    seconds: float


class TrainReport(VersionedRecord):
    """``regraft train --json``."""

    data: str
    base: BaseSummary
    outputs: list[str]
    kind: str
    unit: str = Field(description="what its examples are: texts or pictures")
    learnt: int = Field(description="examples that were learnt from")
    trained: int = Field(description="numbers that were trained")
    modules: int
    batch: int
    rate: float
    steps: int
    stopped: str
    unkept: str = Field(default="", description="why the state of the training could not be kept on disk")
    looks: list[TrainLook]
    notes: list[str] = Field(default_factory=list)
    seconds: float
    peak_mb: float
