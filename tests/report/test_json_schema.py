"""The records as JSON: they come back as they went, and the committed schemas are those of the code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import report_samples as samples

from regraft.errors import InputError
from regraft.report.json_schema import RECORDS, parse, schema, schema_text
from regraft.report.schema import CheckReport, PortReport, VersionedRecord

FOLDER = Path(__file__).parents[2] / "docs" / "schema"


@pytest.mark.parametrize("verb", RECORDS)
def test_committed_schema_is_up_to_date(verb: str) -> None:
    file = FOLDER / f"{verb}.json"
    assert file.read_text(encoding="utf-8") == schema_text(verb), (
        "run: python -m regraft.report.json_schema docs/schema"
    )


@pytest.mark.parametrize(
    "record", [samples.check(), samples.port(), samples.verify(), samples.demo(), samples.refine()]
)
def test_a_record_comes_back_from_its_json(record: VersionedRecord) -> None:
    assert parse(type(record), record.to_json()) == record


def test_schema_uses_the_keys_that_the_json_has() -> None:
    properties = schema(CheckReport)["properties"]
    assert set(json.loads(samples.check().to_json())) == set(properties)
    assert {"from", "to"} <= set(properties)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("not json", "is no JSON"),
        (samples.check().to_json(), "is no PortReport"),
        ("[]", "is no PortReport"),
        (samples.port(samples.llm(), schema_version=99).to_json(), "schema version 99"),
        (samples.port(samples.llm()).to_json().replace('"counts"', '"count"'), "counts"),
    ],
)
def test_a_wrong_record_is_refused_with_what_is_wrong(text: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        parse(PortReport, text, file="report.json")
