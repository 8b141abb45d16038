"""Logit arithmetic as a row of the grid: nothing is ported, the old base runs beside the new one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from regraft.adapter import Adapter
from regraft.bench.cells import Cell
from regraft.bench.variants import Variant
from regraft.bench.worlds import Scores, World
from regraft.bridge.logits import LogitBridge
from regraft.bridge.mixture import check_mix
from regraft.errors import InputError, UsageError
from regraft.runtime.load import Loaded


def check_logits(options: Mapping[str, Any]) -> None:
    """Look through what is asked of it: ``strength``, a number, λ; ``mix``, the adapter's part of a mixture.

    Raises:
        UsageError: there is no such option, or it takes no such value.
    """
    for name, value in options.items():
        if name not in ("strength", "mix"):
            raise UsageError(f"logits has no option {name}", remedy="Known: strength, mix.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"logits takes no {name}={value}", remedy="Give a number.")
    check_mix(options.get("mix"))


def bridged(
    world: World, pair: str, name: str, adapter: Adapter, models: tuple[Loaded, Loaded], variant: Variant
) -> Cell:
    """Scores of the new base with what the adapter does to the old one's next-token scores.

    Args:
        world: of language models.
        pair: its name.
        name: of the adapter.
        adapter: on the old base.
        models: old and new base.
        variant: what was asked for.

    Raises:
        InputError: the world has no texts, or the two models share no tokens.
    """
    scores: Callable[[str, str, LogitBridge], Scores] | None = getattr(world, "bridged", None)
    if scores is None:
        raise InputError(f"{pair} has no language models, whose scores could be added up")
    mix = variant.options.get("mix")
    bridge = LogitBridge(*models, adapter, float(variant.options.get("strength", 1.0)), mix=mix)
    return Cell(row=variant.name, used=variant.method).scored(scores(pair, name, bridge))
