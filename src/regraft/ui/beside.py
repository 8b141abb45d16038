"""Two of the pictures that a comparison drew, beside each other."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.report.html import Cell, cell
from regraft.report.schema import VerifyReport

# Widths in CSS pixels: small pictures are enlarged by whole pixels up to the first, as the contact sheet enlarges them.
_SMALL, _LARGE = 384, 640


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt under a line that divides them.

    Attributes:
        titles: of the left and the right one.
        cells: the pictures; None where either could not be drawn.
        prompt: that both were drawn for.
    """

    titles: tuple[str, str]
    cells: tuple[Cell, Cell] | None
    prompt: str

    @property
    def pixelated(self) -> bool:
        """Whether pixels are to be seen as squares."""
        return all(one.pixelated for one in self.cells or ())

    @property
    def width(self) -> int:
        """The width to show them at, in CSS pixels, where there is room."""
        if not self.cells or not self.pixelated:
            return _LARGE
        widest = max(self.cells, key=lambda one: one.width)
        return widest.width * max(1, _SMALL // max(widest.width, widest.height))


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


def two(record: VerifyReport, left: str | None, right: str | None, row: int | None) -> Pair | None:
    """Both pictures; None where the choice is not made yet, or is of an older comparison."""
    found = {picture.title: picture.png for picture in record.pictures}
    if left is None or right is None or left not in found or right not in found:
        return None
    if row is None or row >= len(record.prompts):
        return None
    cells = [cell(found[title][row]) if row < len(found[title]) else None for title in (left, right)]
    drawn = (cells[0], cells[1]) if cells[0] is not None and cells[1] is not None else None
    return Pair((left, right), drawn, record.prompts[row])
