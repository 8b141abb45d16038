"""Two of the pictures that a comparison drew, beside each other."""

from __future__ import annotations

import base64
import io
from typing import Any

from regraft.report.schema import VerifyReport

# Small pictures are enlarged by whole pixels to about this side, as the contact sheet shows them.
_SIDE = 384


def titles(record: VerifyReport) -> list[str]:
    """Names of the columns."""
    return [picture.title for picture in record.pictures]


def rows(record: VerifyReport) -> list[tuple[str, int]]:
    """Prompts that were drawn, each with its row."""
    return [(prompt, i) for i, prompt in enumerate(record.prompts[: len(record.pictures[0].png)])]


def first(record: VerifyReport) -> tuple[str, str]:
    """The two that are wanted first: what the adapter did, and what the ported one does."""
    names = titles(record)
    return next((title for title in names if "original" in title), names[0]), names[-1]


def two(record: VerifyReport, left: str | None, right: str | None, row: int | None) -> tuple[Any, Any] | None:
    """Both pictures, as PIL has them; None where either could not be drawn, or is of an older comparison."""
    found = {picture.title: picture.png for picture in record.pictures}
    if row is None or left not in found or right not in found:
        return None
    pngs = [found[title][row : row + 1] for title in (left, right)]
    if not all(png and png[0] for png in pngs):
        return None
    return _large(pngs[0][0]), _large(pngs[1][0])


def _large(png: str) -> Any:
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    factor = max(1, _SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
