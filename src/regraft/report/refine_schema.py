"""The record of ``regraft refine``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.report.schema import BaseSummary, Picture, Record, VersionedRecord

# A start with more than this has nothing to gain; a refine that comes to less than that has brought a part over.
_ALL, _MOST = 0.999, 0.5


class RefineLook(Record):
    """What held-out inputs said after some steps."""

    step: int
    recovered: float = Field(description="share of what is wanted that is there: 0 the new base alone, 1 all of it")
    drift: float | None = Field(
        default=None, description="distance from what is wanted on the new base's own inputs, in adapter effects"
    )
    seconds: float
    training_loss: float | None = Field(
        default=None, description="mean over the steps since the look before, in the new base's distance from its aims"
    )


class Refined(Record):
    """Where the training came to, beside where it began; each on held-out inputs that the models made."""

    title: str
    recovered: float
    drift: float | None = Field(default=None, description="as that of a look")
    note: str = Field(default="", description="such as that a part of it has no place in the new base")


class RefineReport(VersionedRecord):
    """``regraft refine --json``."""

    input: str
    outputs: list[str]
    start: str = Field(description="the method, or the file, that it was started from")
    start_reason: str = ""
    objective: str
    objective_reason: str = ""
    hidden: str = Field(
        default="", description="after which blocks the change of hidden states was matched beside the outputs"
    )
    quantised: str = Field(default="", description="how the new base was held in the training, where not whole")
    inputs: str = Field(description="how the inputs were made")
    n_inputs: int
    steps: int = Field(description="the step that was best on held-out inputs, and was kept")
    stopped: str
    unkept: str = Field(default="", description="why the state of the training could not be kept on disk")
    recovered: float = Field(description="on held-out self-made inputs, of what is wanted")
    beside: list[Refined] = Field(
        description="none, copy (where one can be made), the start and the result, on the same inputs"
    )
    looks: list[RefineLook]
    prompts: list[str] = Field(default_factory=list, description="rows of the picture strip")
    pictures: list[Picture] = Field(default_factory=list, description="its columns: the student at some of the looks")
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


def verdict_of(report: RefineReport) -> tuple[str, Literal["good", "warn", "bad"]]:
    """What a refine came to in a word, and whether that is good."""
    if report.steps == 0:
        return ("Nothing left to gain", "good") if report.recovered > _ALL else ("Nothing gained", "warn")
    if report.recovered <= 0:
        return "Not carried over", "bad"
    return ("Refined", "good") if report.recovered >= _MOST else ("Refined in part", "warn")
