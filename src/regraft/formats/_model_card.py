"""The base's name in a model card's front matter, true again after a port.

Facts (huggingface_hub's model cards): ``README.md`` begins with YAML between two lines ``---``; ``base_model: NAME``
there is what the Hub files the adapter under, and peft adds the tag ``base_model:adapter:NAME``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

CARD = "README.md"
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n.*?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
# What YAML reads as it stands; anything else goes in quotes.
_PLAIN = re.compile(r"[A-Za-z0-9_/][\w./\\-]*")


def with_base(card: Path, old: object, new: object) -> str | Path:
    """The card's text with the new base's name where its front matter had the old one; else the file as it is."""
    if not (isinstance(old, str) and isinstance(new, str) and old and new) or old == new:
        return card
    try:
        text = card.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return card
    front = _FRONT.match(text)
    if front is None:
        return card
    name = re.escape(old)
    line = re.compile(
        rf"""^(?P<head>base_model:[ \t]+|[ \t]*-[ \t]+(?P<tag>base_model:(?:adapter:)?))"""
        rf"""(?P<quote>["']?){name}(?P=quote)(?P<tail>[ \t]*\r?)$""",
        re.MULTILINE,
    )

    def renamed(found: re.Match[str]) -> str:
        head, value = found["head"], new
        if found["tag"]:
            head, value = head.removesuffix(found["tag"]), found["tag"] + new
        return head + (value if _PLAIN.fullmatch(new) else json.dumps(value, ensure_ascii=False)) + found["tail"]

    changed = line.sub(renamed, front[0])
    return card if changed == front[0] else changed + text[front.end() :]
