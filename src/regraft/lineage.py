"""Where an adapter came from: the chain of ports, kept in the safetensors header (layout "version 0")."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from regraft.adapter import Adapter
from regraft.errors import InputError

KEY = "regraft_lineage"
VERSION = 0


def ports_of(adapter: Adapter) -> list[dict[str, Any]]:
    """The ports that this adapter has been through, oldest first; empty for one as it was trained.

    Raises:
        InputError: the header's entry is damaged.
    """
    text = adapter.metadata.get(KEY)
    if text is None:
        return []
    try:
        lineage = json.loads(text)
        ports = lineage["ports"]
        if lineage["version"] != VERSION or not all(isinstance(port, dict) for port in ports):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise InputError(
            "the lineage entry of the header can't be read",
            file=adapter.path,
            key=KEY,
            remedy="It is damaged or of a later version: update regraft.",
        ) from None
    return list(ports)


def with_port(adapter: Adapter, port: Mapping[str, Any]) -> dict[str, str]:
    """The adapter's metadata with one more port in its lineage."""
    lineage = {"version": VERSION, "ports": [*ports_of(adapter), dict(port)]}
    return {**adapter.metadata, KEY: json.dumps(lineage, sort_keys=True, ensure_ascii=False)}
