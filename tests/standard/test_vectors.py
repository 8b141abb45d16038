"""Every vector of the standard against its JSON Schema and against this implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from standard_vectors import migration_of, text_of, validator, vectors

from regraft import InputError, load_migration
from regraft.lineage import parse_lineage
from regraft.migrations.maps import in_memory
from regraft.schemas import standard_schema


@pytest.mark.parametrize("name", ["lineage", "migration"])
def test_the_schemas_are_schemas_of_the_draft_that_they_name(name: str) -> None:
    Draft202012Validator.check_schema(standard_schema(name))


@pytest.mark.parametrize(
    ("name", "vector"),
    [(name, v) for name in ("lineage", "migration") for v in vectors(name) if "document" in v],
    ids=lambda value: value["name"] if isinstance(value, dict) else value,
)
def test_the_schema_takes_the_valid_ones_and_rejects_what_it_can_state(name: str, vector: dict[str, Any]) -> None:
    accepted = validator(name).is_valid(vector["document"])
    assert accepted == (vector["valid"] or vector["by"] in ("rules", "values"))


@pytest.mark.parametrize("vector", vectors("lineage"), ids=lambda v: v["name"])
def test_a_lineage_is_read_or_rejected_as_its_vector_says(vector: dict[str, Any]) -> None:
    if vector["valid"]:
        assert parse_lineage(text_of(vector), file="x") == vector["document"]
        return
    with pytest.raises(InputError, match=r"^x: regraft_lineage: ") as error:
        parse_lineage(text_of(vector), file="x")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("vector", vectors("migration"), ids=lambda v: v["name"])
def test_a_migration_is_read_or_rejected_as_its_vector_says(vector: dict[str, Any], tmp_path: Path) -> None:
    file = migration_of(vector, tmp_path)
    if vector["valid"]:
        migration = load_migration(file)
        assert [list(module) for module in migration.entries] == [
            row["module"] for row in vector["document"]["modules"]
        ]
        return
    with pytest.raises(InputError, match=r"m\.safetensors: ") as error:
        # What a map holds is looked at when it is read.
        in_memory(load_migration(file))
    assert len(str(error.value)) < 1000
