"""JSON out of a stranger's header: bounded, without repeated keys, NaN or infinite numbers."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any


def parse_object(text: str, *, most: int) -> dict[str, Any]:
    """The JSON object that ``text`` is.

    Args:
        text: from a file's header.
        most: bytes that it may have in UTF-8.

    Raises:
        ValueError: it is longer, is no JSON object, repeats a key, nests too deep, or holds a number that is none.
    """
    if len(text) > most or len(text.encode("utf-8", "surrogatepass")) > most:
        raise ValueError(f"is longer than {most} bytes")
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, parse_float=_number)
    except RecursionError:
        raise ValueError("nests too deep") from None
    if not isinstance(found, dict):
        raise ValueError("is no JSON object")
    if "\\ud" in text.lower():
        # Half of a surrogate pair is a string that can't be written again.
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _number(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError("a number is too large")
    return number
