"""The records of the verbs that work on adapters alone: convert, resize, merge, extract, diff."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.report.schema import Record, VersionedRecord

#: What a conversion does with one module.
Fate = Literal["kept", "rewritten", "merged", "lost"]


class ConvertedModule(Record):
    """What becomes of one module in the other format."""

    name: str
    kind: str
    becomes: str | None = Field(description="kind in the new file; null where it can't be held")
    status: Fate = Field(
        description="kept: as it is; rewritten: the same change in another form; merged: the change on this base, "
        "refactored; lost: the format can't hold it"
    )
    rank_in: int | None
    rank_out: int | None
    energy_kept: float | None = Field(default=None, description="share of ‖ΔW‖², where it was refactored")
    reason: str = ""


class ConvertReport(VersionedRecord):
    """``regraft convert --json``."""

    input: str
    output: str
    format: str
    modules: int
    changes: list[ConvertedModule] = Field(default_factory=list, description="every module that is not kept as it is")
    removed: list[str] = Field(default_factory=list, description="by --strip-private")
    notes: list[str] = Field(default_factory=list)
    dry_run: bool = False


class ResizedModule(Record):
    """One module's rank before and after."""

    name: str
    kind: str
    rank_in: int | None
    rank_out: int | None
    energy_kept: float | None = Field(description="share of ‖ΔW‖²; null for what has no rank")
    reason: str = ""


class ResizeReport(VersionedRecord):
    """``regraft resize --json``."""

    input: str
    outputs: list[str]
    format: str
    energy_kept: float = Field(description="share of the whole adapter's ‖ΔW‖²")
    modules: list[ResizedModule]
    notes: list[str] = Field(default_factory=list)


class MergedModule(Record):
    """One module of a merged adapter."""

    name: str
    inputs: list[int] = Field(description="which of the inputs change it, counted from 0")
    kinds: list[str]
    how: str = Field(description="alone, concatenated, svd, sum or base")
    rank_in: list[int | None]
    rank_out: int | None
    energy_kept: float | None = None
    reason: str = ""


class MergeReport(VersionedRecord):
    """``regraft merge --json``."""

    inputs: list[str]
    weights: list[float]
    outputs: list[str]
    format: str
    how: str
    modules: list[MergedModule]
    notes: list[str] = Field(default_factory=list)


class ExtractedModule(Record):
    """One parameter that differs between two checkpoints, or why it was left out."""

    name: str
    kind: str | None = Field(description="lora, diff or full; null where it was left out")
    rank: int | None
    energy_kept: float | None
    change: float | None = Field(description="‖ΔW‖ / ‖W‖")
    reason: str = ""


class ExtractReport(VersionedRecord):
    """``regraft extract --json``."""

    base: str
    tuned: str
    outputs: list[str]
    format: str
    energy_kept: float
    unchanged: int = Field(description="parameters that are equal in both")
    modules: list[ExtractedModule]
    notes: list[str] = Field(default_factory=list)


class ComparedModule(Record):
    """One module of two adapters."""

    name: str
    kinds: tuple[str | None, str | None]
    ranks: tuple[int | None, int | None]
    norms: tuple[float | None, float | None] = Field(description="‖ΔW‖ in either")
    cosine: float | None = Field(description="of the two ΔW")
    distance: float | None = Field(description="‖ΔW − ΔW′‖")
    equal: bool = Field(description="byte for byte the same tensors")
    reason: str = ""


class DiffReport(VersionedRecord):
    """``regraft diff --json``."""

    first: str
    second: str
    formats: tuple[str, str]
    families: tuple[str | None, str | None]
    cosine: float | None = Field(description="of the whole updates, over modules in both")
    norms: tuple[float, float]
    distance: float = Field(description="‖ΔW − ΔW′‖ over all modules; what only one has counts in full")
    equal: int
    only_first: list[str]
    only_second: list[str]
    modules: list[ComparedModule] = Field(description="in both, what differs most first")
    metadata: dict[str, tuple[str | None, str | None]] = Field(
        default_factory=dict, description="header entries that differ"
    )
