"""The record of ``regraft bridge run``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.report.schema import Record, VersionedRecord


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
    strength: float
    seed: int
    prompts: list[str]
    texts: list[BridgedText] = Field(default_factory=list)
    outputs: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    seconds: float
