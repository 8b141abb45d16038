"""The records of ``regraft identify --json`` and ``regraft fingerprint --json``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from regraft.report.schema import Record, VersionedRecord

Match = Literal["exact", "same", "likely", "possible", "other", "unfit"]


class ClueSummary(Record):
    """One thing that the adapter says of its base."""

    source: str = Field(description="where it stands: a metadata key, a config entry")
    kind: Literal["fingerprint", "sketch", "hash", "name"]
    value: str


class CandidateSummary(Record):
    """One base that was looked at."""

    path: str
    family: str | None
    match: Match = Field(
        description=(
            "exact: a hash or fingerprint is equal; same: the same weights up to rounding; likely: the name says so; "
            "possible: it fits and nothing speaks against it; other: it fits, but a hash differs; unfit: its modules "
            "are not the adapter's"
        )
    )
    evidence: list[str]


class IdentifyReport(VersionedRecord):
    """``regraft identify --json``."""

    file: str
    family: str | None
    clues: list[ClueSummary]
    candidates: list[CandidateSummary] = Field(description="the best first")
    found: str | None = Field(description="path of the base, where one is exact, same or the only likely one")
    summary: str


class LikenessSummary(Record):
    """How alike one component of two bases is."""

    verdict: Literal["identical", "same", "drifted", "unrelated", "other"]
    basis: Literal["content", "sample", "sketch", "structure"]
    drift: float | None = Field(description="estimate of ‖W2 − W1‖ / ‖W1‖")
    error: float | None = Field(description="its standard error")
    floor: float | None = Field(description="the drift that rounding and quantisation alone explain")
    similarity: float | None = Field(description="cosine of the samples; 1 equal, about 0 unrelated")
    overlap: float = Field(description="share of the first one's elements that lie in tensors that both have")
    touched: float | None = Field(description="share of the common elements that lie in tensors that differ")


class ComparedBase(Record):
    """The base that the first one was compared with."""

    path: str
    family: str | None
    fingerprint: str
    components: dict[str, LikenessSummary]


class FingerprintReport(VersionedRecord):
    """``regraft fingerprint --json``."""

    path: str
    family: str | None
    fingerprint: str = Field(description="the short form")
    structure: str
    prints: dict[str, Any] = Field(description="the JSON form; sketches with --sketch alone")
    brief: str | None = Field(description="the brief sketch, a line of at most 4096 characters")
    other: ComparedBase | None = None
    summary: str
