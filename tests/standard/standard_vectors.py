"""The vectors of tests/standard/vectors, and what judges them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from safetensors.torch import save_file

from regraft.migration_file import KEY
from regraft.schemas import standard_schema
from regraft.tensor_files import SAFETENSORS_DTYPES

VECTORS = Path(__file__).parent / "vectors"


def vectors(name: str) -> list[Any]:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


@cache
def validator(name: str) -> Draft202012Validator:
    """jsonschema's own, for the schema in the package."""
    schemas = [standard_schema("lineage"), standard_schema("migration")]
    registry = Registry().with_resources([(schema["$id"], Resource.from_contents(schema)) for schema in schemas])
    return Draft202012Validator(next(s for s in schemas if s["$id"] == f"urn:regraft:{name}:1"), registry=registry)


def text_of(vector: dict[str, Any]) -> str:
    text = vector.get("text")
    if text is None:
        return json.dumps(vector["document"])
    if isinstance(text, dict):
        opening, times, closing, again = text["repeat"]
        return opening * times + closing * again
    return text


def migration_of(vector: dict[str, Any], folder: Path) -> Path:
    """The safetensors file that a migration's vector stands for."""
    tensors = {
        name: torch.full(tuple(t["shape"]), float(t.get("fill", 0))).to(SAFETENSORS_DTYPES[t["dtype"]])
        for name, t in vector["tensors"].items()
    }
    file = folder / "m.safetensors"
    save_file(tensors or {"empty.0": torch.zeros(0)}, file, metadata={KEY: text_of(vector)})
    return file
