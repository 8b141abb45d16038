"""The record of ``regraft demo``: one near upgrade carried over, the ones that are refused, and the contact sheet."""

from __future__ import annotations

from pydantic import Field

from regraft.report.refine_schema import RefineReport
from regraft.report.schema import CheckReport, InspectReport, Picture, PortReport, Record, VerifyReport, VersionedRecord


class NearUpgrade(Record):
    """The upgrade that the demo's LoRA is carried over."""

    label: str = "v1 → v2"
    check: CheckReport
    port: PortReport
    verify: VerifyReport | None = None


class LabelledCheck(Record):
    """A check of another new base, with the name that the page calls it by."""

    label: str
    check: CheckReport


class FarUpgrade(Record):
    """The LoRA distilled into a base that a port is refused for, or why that is not possible."""

    label: str
    title: str = Field(description="of its column on the contact sheet")
    refine: RefineReport | None = None
    self_made: int = Field(default=0, description="pictures by the old base that the new one learnt from")
    reason: str = Field(default="", description="why it is not possible, where it is not")


class DemoReport(VersionedRecord):
    """``regraft demo --json``, and all that its page shows."""

    title: str
    intro: str
    inspect: InspectReport | None = None
    near: NearUpgrade
    refusals: list[LabelledCheck] = Field(default_factory=list)
    refined: list[FarUpgrade] = Field(default_factory=list, description="with ``--refine``: the refused ones, refined")
    prompts: list[str] = Field(default_factory=list, description="rows of the contact sheet")
    columns: list[Picture] = Field(
        default_factory=list, description="columns of the contact sheet, neighbours of one group under one heading"
    )
    same_columns: list[tuple[str, str]] = Field(
        default_factory=list, description="titles of columns that hold the same pictures"
    )
    same_reason: str = Field(default="", description="why they do, such as that `auto` chose to copy")
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0.0
    peak_mb: float = 0.0
