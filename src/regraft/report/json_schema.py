"""The records' JSON Schema, and reading a record back with an error that says what is wrong with it.

``python -m regraft.report.json_schema docs/schema`` writes the files that the documentation carries.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from regraft.errors import InputError
from regraft.report.batch_schema import BatchReport
from regraft.report.bench_schema import BenchReport
from regraft.report.bridge_schema import BridgeReport, BridgeTrainReport
from regraft.report.demo_schema import DemoReport
from regraft.report.doctor_schema import DoctorReport
from regraft.report.identify_schema import FingerprintReport, IdentifyReport
from regraft.report.ops_schema import ConvertReport, DiffReport, ExtractReport, MergeReport, ResizeReport
from regraft.report.pairs_schema import PairInfo
from regraft.report.push_schema import PushReport
from regraft.report.refine_schema import RefineReport
from regraft.report.schema import (
    SCHEMA_VERSION,
    CheckReport,
    InspectReport,
    MethodInfo,
    PortReport,
    VerifyReport,
    VersionedRecord,
)
from regraft.report.serving_schema import ServingReport
from regraft.report.speed_schema import SpeedReport
from regraft.report.train_schema import TrainReport

#: What each verb prints with ``--json``; ``serving`` is the index of ``regraft batch --serve``.
RECORDS: dict[str, Any] = {
    "inspect": InspectReport,
    "identify": IdentifyReport,
    "fingerprint": FingerprintReport,
    "check": CheckReport,
    "port": PortReport,
    "batch": BatchReport,
    "serving": ServingReport,
    "refine": RefineReport,
    "verify": VerifyReport,
    "methods": list[MethodInfo],
    "pairs": list[PairInfo],
    "demo": DemoReport,
    "convert": ConvertReport,
    "resize": ResizeReport,
    "merge": MergeReport,
    "extract": ExtractReport,
    "diff": DiffReport,
    "bench": BenchReport,
    "bench-speed": SpeedReport,
    "train": TrainReport,
    "bridge": BridgeReport,
    "bridge-train": BridgeTrainReport,
    "doctor": DoctorReport,
    "push": PushReport,
}

R = TypeVar("R", bound=VersionedRecord)


def schema(record_class: Any) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a record class, or of a list of records."""
    found = TypeAdapter(record_class).json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def schema_text(verb: str) -> str:
    """The schema file of one verb, as it is committed."""
    return json.dumps(schema(RECORDS[verb]), indent=2, ensure_ascii=False) + "\n"


def parse(record_class: type[R], text: str, *, file: str | Path | None = None) -> R:
    """Read a record back.

    Raises:
        InputError: when the text is no JSON, another record, or of a schema version that this regraft doesn't know.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise InputError(f"is no JSON ({error})", file=file) from None
    version = raw.get("schema_version", SCHEMA_VERSION) if isinstance(raw, dict) else SCHEMA_VERSION
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"has schema version {version}, this regraft reads up to {SCHEMA_VERSION}", file=file, remedy="Upgrade it."
        )
    try:
        return record_class.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or None
        what = f"is no {record_class.__name__} ({first['msg']}; {error.error_count()} in all)"
        raise InputError(what, file=file, key=where) from None


def main(folder: str) -> None:
    """Write every schema into ``folder``."""
    for verb in RECORDS:
        Path(folder, f"{verb}.json").write_text(schema_text(verb), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
