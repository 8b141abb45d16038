"""The record of ``regraft batch``: one row an adapter, and what they come to."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from regraft.report.schema import BaseSummary, Counts, Forecast, Record, Verdict, VersionedRecord
from regraft.report.serving_schema import ServingFacts

RowStatus = Literal["ported", "forecast", "refused", "failed"]


class BatchRow(Record):
    """What became of one adapter; a line of ``results.jsonl``, a row of ``results.parquet``."""

    adapter: str = Field(description="path, URL or hub id")
    name: str = Field(description="in its library; what the output is called after")
    source: str = Field(alias="from", description="the old base, as it was given")
    target: str = Field(alias="to", description="the new base, likewise")
    options: dict[str, Any] = Field(default_factory=dict, description="those that are not the defaults")
    key: str | None = Field(
        default=None,
        description="hash of the adapter's bytes, both fingerprints and the options: what a resume goes by",
    )
    status: RowStatus = Field(description="forecast: of `batch check`; failed: it could not be read, run or written")
    verdict: Verdict | None = None
    tier: Literal["port", "refine", "bridge"] | None = Field(default=None, description="the advised one")
    reason: str = Field(default="", description="of a refusal or failure; else what the verdict rests on")
    remedy: str = Field(default="", description="what a user can do about a refusal or failure")
    format: str | None = None
    method: str | None = Field(default=None, description="that carried it, or would")
    counts: Counts | None = Field(default=None, description="modules")
    skipped_share: float | None = Field(default=None, description="share of ‖ΔW‖² that has no place in the new base")
    forecast: Forecast | None = Field(default=None, description="of a port, by `batch check` and `batch --serve`")
    output: str = Field(default="", description="what its outputs are called, without suffix")
    outputs: list[str] = Field(default_factory=list, description="inside of the output folder")
    output_hashes: list[str] = Field(default_factory=list, description="of their bytes")
    serving: list[ServingFacts] = Field(default_factory=list, description="of each output, by `batch --serve`")
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    attempts: int = Field(default=1, description="how often it was begun: a worker may die")
    reused: bool = Field(default=False, description="an earlier run had made it")


class BatchPair(Record):
    """One pair of bases with one way of fitting."""

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    method: str
    old: BaseSummary | None = None
    new: BaseSummary | None = None
    shared: bool = Field(description="whether its migration was fitted once for all of its adapters")
    note: str = Field(default="", description="why not, or why the method was chosen")
    rows: int
    seconds: float = Field(default=0.0, description="of the fit")


class BatchCounts(Record):
    """How many adapters are what. ``survives``, ``refine`` and ``refused`` are verdicts."""

    rows: int
    ported: int = 0
    survives: int = 0
    refine: int = 0
    refused: int = 0
    failed: int = 0
    reused: int = 0


class BatchReport(VersionedRecord):
    """``regraft batch --json``."""

    check: bool = Field(description="a forecast: nothing was ported")
    summary: str
    counts: BatchCounts
    pairs: list[BatchPair]
    out: str | None = None
    tables: list[str] = Field(default_factory=list, description="files that hold the rows")
    executor: str = Field(description="what ran it, such as `2 processes`")
    rows: list[BatchRow] = Field(description="worst first")
    seconds: float
