"""The records: what each verb says with ``--json``. The terminal tables and the HTML page are views of these.

Fields are only ever added within a schema version; `SCHEMA_VERSION` rises when one changes its meaning.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticSerializationError

SCHEMA_VERSION = 1


class Record(BaseModel):
    """Common ground of all records."""

    model_config = ConfigDict(populate_by_name=True)

    def to_json(self) -> str:
        """The record as people's tools read it: aliases as keys, two spaces of indent."""
        try:
            return self.model_dump_json(by_alias=True, indent=2)
        except PydanticSerializationError:
            # Half of a surrogate pair, as the name of a file that is no UTF-8 has it, can only be written escaped.
            return json.dumps(self.model_dump(by_alias=True), indent=2)


class VersionedRecord(Record):
    """A record that stands alone."""

    schema_version: int = SCHEMA_VERSION
    regraft_version: str = ""


class ComponentSummary(Record):
    """One component of an adapter (``unet``, ``text_encoder``, ``model``, …)."""

    modules: int
    kinds: dict[str, int]
    ranks: list[int]
    alphas: list[float]


class InspectReport(VersionedRecord):
    """``regraft inspect --json``."""

    file: str
    format: str
    family: str | None
    components: dict[str, ComponentSummary]
    tokens: dict[str, list[int]] = Field(description="added token → shape of its embedding")
    metadata: dict[str, str]
    unrecognised: list[str]


Status = Literal["ported", "skipped", "refused"]


class BaseSummary(Record):
    """One base of a pair."""

    path: str
    family: str | None
    fingerprint: str
    structure: str
    # For files that name the base, not for reports: a lineage or migration is to recognise it in another precision.
    sketch: SkipJsonSchema[str | None] = Field(default=None, exclude=True, repr=False)
    components: SkipJsonSchema[dict[str, str]] = Field(default_factory=dict, exclude=True, repr=False)
    content: SkipJsonSchema[dict[str, str]] = Field(default_factory=dict, exclude=True, repr=False)


class CheckedModule(Record):
    """What will happen to one module, and how near the two bases are there."""

    name: str
    target: str | None
    status: Status
    reason: str
    similarity: float | None = Field(description="chance-corrected cosine of old and new weight; 1 equal, 0 unrelated")
    distance: float | None = Field(description="relative drift ‖W_new − W_old‖ / ‖W_old‖")
    adapter_distance: float | None = Field(
        default=None, description="the same drift, seen only from the update's own row and column spaces"
    )
    share: float | None = Field(default=None, description="the module's share of ‖ΔW‖² over the whole adapter")


class Forecast(Record):
    """Expected share of a native adapter's gain, with an interval."""

    recovery: float
    low: float
    high: float
    basis: Literal["headers", "weights", "activations"] = Field(
        default="weights", description="what it was read from; `activations` only where both models were run"
    )
    pairs: int = Field(default=0, description="pairs of bases that were measured for it")
    adapters: int = Field(default=0, description="adapters on them")


class Forecasts(Record):
    """By tier; the tier `port` by the method that was asked for, and by matching effects where a model is run for it.

    A tier is null where too little was measured to say anything.
    """

    port: Forecast | None = None
    effect: Forecast | None = Field(default=None, description="port, by matching the adapter's effect layer by layer")
    stream: Forecast | None = Field(default=None, description="port, by matching its effect on the residual stream")
    refine: Forecast | None = None
    bridge: Forecast | None = None


Verdict = Literal["survives", "refine", "refused"]


class CheckReport(VersionedRecord):
    """``regraft check --json``."""

    input: str
    verdict: Verdict
    summary: str = Field(description="the verdict in a sentence")
    reasons: list[str]
    tier: Literal["port", "refine", "bridge"]
    method: str
    method_note: str = Field(default="", description="where `port` may take another one than the weights give")
    forecast: Forecasts = Forecasts()
    similarity: float | None = Field(description="mean over modules, weighted by their share of ‖ΔW‖²")
    distance: float | None = Field(description="likewise")
    modules: list[CheckedModule]
    source: BaseSummary | None = Field(alias="from")
    target: BaseSummary = Field(alias="to")
    warnings: list[str] = Field(
        default_factory=list, description="what the weights don't show, such as another target of prediction"
    )


class PortedModule(Record):
    """What happened to one module."""

    name: str
    target: str | None
    status: Status
    reason: str
    energy_kept: float | None = Field(description="‖ΔW ported‖² / ‖ΔW‖²: a diagnostic, not fidelity")
    rank_in: int | None
    rank_out: int | None
    cut_loss: float | None = Field(default=None, description="share of ‖ΔW‖² lost by the cut to the output's rank")
    similarity: float | None = None
    distance: float | None = None
    share: float | None = None


class Counts(Record):
    ported: int
    skipped: int
    refused: int


class PortReport(VersionedRecord):
    """``regraft port --json``."""

    input: str
    outputs: list[str]
    method: str
    method_reason: str = Field(default="", description="why `auto` chose this method")
    options: dict[str, Any] = Field(default_factory=dict)
    figures: dict[str, float] = Field(default_factory=dict, description="what the method measured on the way")
    verdict: Verdict | None
    summary: str
    reasons: list[str] = Field(default_factory=list)
    forced: bool = False
    counts: Counts
    skipped_share: float = Field(description="share of ‖ΔW‖² in modules that have no place in the new base")
    modules: list[PortedModule]
    unrecognised: list[str] = Field(default_factory=list)
    source: BaseSummary | None = Field(default=None, alias="from")
    target: BaseSummary | None = Field(default=None, alias="to")
    migration: str | None = Field(default=None, description="migration file that was used or written")
    migration_bytes: int | None = Field(default=None, description="its size")
    path: list[str] = Field(default_factory=list, description="migration files of `--migrations`, in order")
    tokens: list[str] = Field(default_factory=list, description="added tokens, carried as they are")
    left_behind: list[str] = Field(default_factory=list, description="other weights files that lay beside it")
    removed: list[str] = Field(default_factory=list, description="header entries taken out by --strip-private")
    seconds: float
    peak_mb: float


class Interval(Record):
    """A mean with its 95 % bootstrap interval over inputs; all null where it is not defined, with the reason."""

    mean: float | None
    low: float | None
    high: float | None
    reason: str | None = None


class Effect(Record):
    """The effect of one adapter on the new base, beside the original's on the old base."""

    effect_cosine: Interval
    effect_norm_ratio: Interval
    kl: Interval | None = None


class Picture(Record):
    """One column of pictures for the page: PNGs in base64, one per prompt."""

    title: str
    group: str
    png: list[str]
    note: str = ""
    figures: dict[str, float] = Field(default_factory=dict)


class VerifyReport(VersionedRecord):
    """``regraft verify --json``."""

    original: str
    ported: str
    source: str = Field(alias="from")
    target: str = Field(alias="to")
    model_class: str
    n_inputs: int
    inputs: str = Field(description="how the inputs were made")
    effect_cosine: Interval
    effect_norm_ratio: Interval
    kl: Interval | None = None
    controls: dict[str, Effect]
    summary: str
    prompts: list[str] = Field(default_factory=list)
    pictures: list[Picture] = Field(default_factory=list)
    seconds: float


class MethodInfo(Record):
    """One row of ``regraft methods --json``."""

    name: str
    reference: str
    summary: str
    needs: list[str]
    scope: Literal["pair", "adapter"]
    tier: Literal["port", "refine", "bridge"]
    options: dict[str, Any] = Field(default_factory=dict)
