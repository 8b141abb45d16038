"""The record of ``regraft doctor``."""

from __future__ import annotations

from pydantic import Field

from regraft.report.schema import Record, VersionedRecord


class Package(Record):
    """A package that some verbs need."""

    name: str
    version: str | None = Field(description="null: it is not installed")
    purpose: str
    get: str = Field(description="the command that installs it")


class Device(Record):
    """Something that models can run on."""

    name: str = Field(description="as --device takes it")
    description: str
    memory_mb: int | None = None
    bfloat16: bool = Field(description="it computes in bfloat16 itself; elsewhere that is slow")


class VerbNeeds(Record):
    """What a verb lacks."""

    verb: str
    missing: list[str] = Field(description="packages; none where it works")
    part: str = Field(default="", description="what of it does not work; empty for all of it")
    get: list[str] = Field(default_factory=list, description="the commands that install them")


class DoctorReport(VersionedRecord):
    """``regraft doctor --json``."""

    python: str
    platform: str
    torch: str
    processors: int = Field(description="of this process")
    memory_mb: int
    free_mb: int
    devices: list[Device]
    packages: list[Package]
    verbs: list[VerbNeeds]
    tools: dict[str, str] = Field(description="programs outside of Python, and where they are")
    cache: str
    cache_mb: float
    hub_token: bool = Field(default=False, description="a token for the hub is set; it is told to nobody")
