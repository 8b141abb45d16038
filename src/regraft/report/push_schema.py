"""The record of ``regraft push``."""

from __future__ import annotations

from pydantic import Field

from regraft.report.schema import VersionedRecord


class PushReport(VersionedRecord):
    """``regraft push --json``."""

    adapter: str
    repository: str | None = Field(description="null: only the card was written")
    files: list[str] = Field(description="that were sent")
    address: str = Field(description="of the commit; empty where nothing was sent")
    outputs: list[str] = Field(default_factory=list, description="files written here")
