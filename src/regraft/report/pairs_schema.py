"""What ``regraft pairs --json`` says."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.report.schema import Record


class PairInfo(Record):
    """One known pair of bases."""

    name: str
    title: str
    source: str = Field(alias="from", description="family of the old base")
    target: str = Field(alias="to", description="family of the new base; the same where its fine-tunes are meant")
    tier: Literal["port", "refine", "bridge"] = Field(description="the one that usually applies")
    changes: list[str]
    widened: dict[str, tuple[int, int]] = Field(description="module → input channels of the old and of the new base")
    components: dict[str, list[str]] = Field(description="old component → new ones, where not the same")
    examples: list[str]
