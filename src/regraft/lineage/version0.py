"""The lineage that regraft wrote before there was a specification, read as version 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.lineage.name_sets import compact

_UNKNOWN = "unknown:00000000"


def upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` itself, unless it is of version 0.

    Raises:
        ValueError: it is of version 0 and damaged.
    """
    version = document.get("version")
    if isinstance(version, bool) or version != 0 or not isinstance(version, int):
        return document
    ports = document.get("ports")
    if not isinstance(ports, list) or not ports or not all(isinstance(port, dict) for port in ports):
        raise ValueError("version 0 holds a list of ports, and this is none")
    carried = [_port(port) for port in ports]
    return {"version": "1.0", "base": carried[-1]["to"], "ports": carried}


def _port(port: Mapping[str, Any]) -> dict[str, Any]:
    skipped = port.get("skipped", {})
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items() if isinstance(skipped, dict) else ():
        by_reason.setdefault(str(reason), []).append(str(name))
    source, target = port.get("from"), port.get("to")
    return {
        "from": _base(source) if source is not None else None,
        "to": {**_base(target), **({"family": port["family"]} if isinstance(port.get("family"), str) else {})},
        "method": port.get("method", "unknown"),
        "options": port.get("options", {}),
        "strength": port.get("strength", 1.0),
        # Version 0 spelt a module as one string; its component is not told apart.
        "lost": [
            {"status": "skipped", "reason": reason, "modules": {"*": compact(names)}}
            for reason, names in by_reason.items()
        ],
        "verdict": port.get("verdict"),
        "forced": port.get("forced", False),
        "tool": f"regraft {port.get('regraft', '0')}",
    }


def _base(fingerprint: object) -> dict[str, Any]:
    return {"fingerprint": fingerprint if isinstance(fingerprint, str) else _UNKNOWN}
