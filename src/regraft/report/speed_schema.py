"""What ``regraft bench speed --json`` says."""

from __future__ import annotations

from pydantic import Field

from regraft.report.schema import Record, VersionedRecord


class MethodSpeed(Record):
    """One method on the pair. Seconds are on the clock, over the start of the interpreter with torch."""

    cold_s: float = Field(description="a port from both checkpoints, neither of them in the page cache")
    cold_processor_s: float = Field(description="processor time of the same")
    warm_s: float | None = Field(default=None, description="a port by a saved migration; null where none was made")
    peak_mb: float = Field(description="resident memory of the cold port over the interpreter with torch, 10⁶ bytes")
    warm_peak_mb: float | None = None
    reference_s: float | None = Field(
        default=None,
        description="the plain way: both models in memory, torch.linalg.svd of each module; measured on one module of "
        "each shape, and multiplied by their number; null where there is none",
    )
    apart: float | None = Field(
        default=None, description="largest ‖ΔW − ΔW'‖ / ‖ΔW'‖ between ours and the plain way's, over that sample"
    )


class ShapeCount(Record):
    """How many of the adapter's modules have weights of one shape."""

    shape: list[int]
    modules: int


class SpeedCurve(Record):
    """How time and memory grow with one thing, all else alike."""

    along: str = Field(description="what grows: `modules`, `width`, `rank` or `adapters`")
    values: list[float]
    gigabytes: list[float] = Field(description="of weights and adapters that have to be read, 10⁹ bytes")
    seconds: list[float] = Field(description="over the start, on the clock")
    peak_mb: list[float] = Field(description="over the interpreter with torch")
    seconds_per_gigabyte: float | None = Field(
        description="slope of the line through (gigabytes, seconds); null along ranks, which change hardly any bytes"
    )
    fit: float | None = Field(description="R² of that line")


class RunningSpeed(Record):
    """What methods that run both models take, on the embedded demo's v1 → v2 and its LoRA."""

    n_inputs: int
    floor_s: float = Field(description="one forward pass of these inputs through both models")
    seconds: dict[str, float] = Field(description="`effect` once its inputs are made; `stream` with the drawing of its")


class SpeedReport(VersionedRecord):
    """Seconds and memory at one family's true size."""

    command: str
    date: str
    machine: dict[str, str | int]
    cold: bool = Field(
        description="whether checkpoints could be dropped from the page cache before each port; the plain way, the "
        "making of migrations and a library of adapters read them from there"
    )
    threads: int
    runs: int = Field(description="the median of so many is given")
    family: str
    title: str
    modules: int = Field(description="that the adapter changes")
    rank: int
    shapes: list[ShapeCount]
    checkpoints_mb: float
    adapter_mb: float
    start_s: float = Field(description="the interpreter with torch and regraft, which all other seconds are over")
    start_mb: float
    read_s: float = Field(description="reading both checkpoints once, neither of them in the page cache")
    read_processor_s: float = Field(description="processor time of the same: the system's own")
    adapter_s: float = Field(description="reading the adapter and writing it, through to the disk")
    inspect_s: float = Field(description="`inspect` of a LoRA for the same modules, of about 200 MB")
    check_s: float
    check_peak_mb: float
    methods: dict[str, MethodSpeed]
    migration_mb: dict[str, float]
    migration_read_s: dict[str, float] = Field(description="reading each migration once, not in the page cache")
    running: RunningSpeed | None = None
    curves: list[SpeedCurve] = Field(default_factory=list)
