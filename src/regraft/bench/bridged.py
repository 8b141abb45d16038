"""Logit arithmetic as a row of the grid: nothing is ported, the old base runs beside the new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from regraft.bench.cells import Cell
from regraft.bench.variants import Variant
from regraft.bench.worlds import Scores
from regraft.errors import InputError, UsageError

if TYPE_CHECKING:
    from regraft.bench.group import Group
    from regraft.bridge.logits import LogitBridge


def check_logits(options: Mapping[str, Any]) -> None:
    """Look through what is asked of it: ``strength``, a number, λ.

    Raises:
        UsageError: there is no such option, or it takes no such value.
    """
    for name, value in options.items():
        if name != "strength":
            raise UsageError(f"logits has no option {name}", remedy="Known: strength.")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"logits takes no strength={value}", remedy="Give a number.")


def bridged(group: Group, variant: Variant) -> Cell:
    """Scores of the new base with what the adapter does to the old one's next-token scores.

    Raises:
        InputError: the world has no texts, or the two models share no tokens.
    """
    scores: Callable[[str, str, LogitBridge], Scores] | None = getattr(group.world, "bridged", None)
    if scores is None:
        raise InputError(f"{group.spec.name} has no language models, whose scores could be added up")
    from regraft.bridge.logits import LogitBridge

    strength = float(variant.options.get("strength", 1.0))
    bridge = LogitBridge(group.model("old"), group.model("new"), group.adapter, strength)
    return Cell(row=variant.name, used=variant.method).scored(scores(group.spec.name, group.name, bridge))
