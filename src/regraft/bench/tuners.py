"""What the recipes of both worlds say of an adapter that is no LoRA of theirs: its kind, and PEFT's config of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regraft.training.kinds import config_of


@dataclass(frozen=True)
class Tuner:
    """An adapter of another kind, on the same data with the same budget.

    Attributes:
        kind: one of `regraft.training.kinds.KINDS`.
        options: further fields of PEFT's config, by name.
    """

    kind: str = "lora"
    options: tuple[tuple[str, Any], ...] = ()

    def config(self, targets: tuple[str, ...]) -> Any:
        """PEFT's config, for modules as PEFT takes their names."""
        return config_of(self.kind, targets=targets, options=dict(self.options))
