"""The record of ``regraft identify --json``."""

from __future__ import annotations

from typing import Literal

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
