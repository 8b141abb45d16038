"""The record of ``regraft refine``."""

from __future__ import annotations

from pydantic import Field

from regraft.report.schema import BaseSummary, Record, VersionedRecord


class RefineLook(Record):
    """What held-out inputs said after some steps."""

    step: int
    recovered: float = Field(description="share of what is wanted that is there: 0 the new base alone, 1 all of it")
    drift: float | None = Field(
        default=None, description="distance from what is wanted on the new base's own inputs, in adapter effects"
    )
    seconds: float


class Refined(Record):
    """Where the training came to, beside where it began; each on held-out inputs that the models made."""

    title: str
    recovered: float


class RefineReport(VersionedRecord):
    """``regraft refine --json``."""

    input: str
    outputs: list[str]
    start: str = Field(description="the method, or the file, that it was started from")
    start_reason: str = ""
    objective: str
    objective_reason: str = ""
    inputs: str = Field(description="how the inputs were made")
    n_inputs: int
    steps: int = Field(description="the step that was best on held-out inputs, and was kept")
    stopped: str
    unkept: str = Field(default="", description="why the state of the training could not be kept on disk")
    recovered: float = Field(description="on held-out self-made inputs, of what is wanted")
    beside: list[Refined] = Field(description="none, copy and the start, on the same inputs")
    looks: list[RefineLook]
    summary: str
    trained: int = Field(description="numbers that were trained")
    modules: int = Field(description="modules that were trained")
    untrained: dict[str, str] = Field(
        default_factory=dict, description="parts of the adapter kept as the port made them"
    )
    source: BaseSummary | None = Field(default=None, alias="from")
    target: BaseSummary | None = Field(default=None, alias="to")
    seconds: float
    peak_mb: float
