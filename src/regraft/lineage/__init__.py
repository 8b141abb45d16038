"""Where an adapter belongs and where it came from, kept in the safetensors header: see docs/standard.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regraft.adapter import Adapter
from regraft.errors import InputError
from regraft.lineage.model import VERSION, Lineage
from regraft.lineage.strict_json import parse_object
from regraft.lineage.version0 import upgraded

KEY = "regraft_lineage"
#: Bytes of the longest lineage that is read.
MOST_BYTES = 8 << 20


def parse_lineage(text: str, *, file: str | Path | None = None) -> dict[str, Any]:
    """The lineage document, checked, with every field that it has; version 0 is read as version 1.

    Raises:
        InputError: it is damaged, or of a later major version.
    """
    try:
        found = upgraded(parse_object(text, most=MOST_BYTES))
        check_major(found, file=file, key=KEY)
        Lineage.model_validate(found)
    except ValidationError as error:
        raise InputError(
            f"the lineage entry of the header is not valid ({told(error)})",
            file=file,
            key=KEY,
            remedy="It is damaged: get the file again. `regraft lineage validate` lists every fault.",
        ) from None
    except ValueError as error:
        raise InputError(
            f"the lineage entry of the header can't be read ({error})",
            file=file,
            key=KEY,
            remedy="It is damaged: get the file again.",
        ) from None
    return found


def check_major(document: Mapping[str, Any], *, file: str | Path | None, key: str) -> None:
    """Fail on a later major version before its fields are judged.

    Raises:
        InputError: it is one.
    """
    version = str(document.get("version"))
    major = version.partition(".")[0]
    if major.isascii() and major.isdigit() and len(major) < 9 and int(major) > int(VERSION.partition(".")[0]):
        raise InputError(f"is of version {version[:20]}, which is later", file=file, key=key, remedy="Update regraft.")


def told(error: ValidationError) -> str:
    """The first fault of a document, and how many more there are."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:120]
    rest = f"; {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}{rest}" if where else f"{first['msg']}{rest}"


def lineage_of(adapter: Adapter) -> dict[str, Any] | None:
    """The adapter's lineage document, or None where it has none.

    Raises:
        InputError: it is damaged, or of a later major version.
    """
    text = adapter.metadata.get(KEY)
    return None if text is None else parse_lineage(text, file=adapter.path)


def ports_of(adapter: Adapter) -> list[dict[str, Any]]:
    """The ports that this adapter has been through, oldest first; empty for one as it was trained.

    Raises:
        InputError: the header's entry is damaged.
    """
    lineage = lineage_of(adapter)
    return list(lineage.get("ports", [])) if lineage is not None else []


def with_port(adapter: Adapter, port: Mapping[str, Any]) -> dict[str, str]:
    """The adapter's metadata with one more port in its lineage, and its ``to`` as the base.

    ``updates`` speaks of modules before the port: whoever writes the file states it anew (see `restated`).
    """
    known = lineage_of(adapter) or {"version": VERSION, "ports": []}
    kept = {name: value for name, value in known.items() if name != "updates"}
    lineage = {**kept, "base": port["to"], "ports": [*known.get("ports", []), dict(port)]}
    return {**adapter.metadata, KEY: dumped(lineage)}


def dumped(document: Mapping[str, Any]) -> str:
    """The document as the one text that stands for it: keys sorted, no spaces."""
    return json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
