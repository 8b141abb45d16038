"""Shapes of the base's weights, told to updates whose files don't tell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from regraft.tensors import Shape
from regraft.updates._by_shape import ByShape
from regraft.updates.vera import Vera, projections

if TYPE_CHECKING:
    from regraft.updates import Update

K = TypeVar("K")


def with_shapes(updates: Mapping[K, Update], shapes: Mapping[K, Shape]) -> dict[K, Update]:
    """The updates, each that waits for its weight's shape told it; all others, and those that don't fit, as they are.

    Args:
        updates: of one whole adapter: VeRA's projections may have to be drawn at the largest of its modules' sizes.
        shapes: of the base's weights, as far as they are known.
    """
    found = dict(updates)
    for name, update in updates.items():
        shape = shapes.get(name)
        if isinstance(update, ByShape) and update.weight_shape is None and shape is not None and update.fits(shape):
            found[name] = update.shaped(shape)
    return _drawn(found)


def _drawn(updates: Mapping[K, Update]) -> dict[K, Update]:
    """The updates, the projections of `Vera` that no file holds drawn, once every module's shape is known.

    Args:
        updates: of one whole adapter.
    """
    found = dict(updates)
    waiting = {name: update for name, update in updates.items() if isinstance(update, Vera) and update.a is None}
    first = next(iter(waiting.values()), None)
    if first is None or first.seed is None or len(waiting) != first.seed.modules:
        return found
    if any(u.weight_shape is None or (u.seed, u.rank) != (first.seed, first.rank) for u in waiting.values()):
        return found
    sides = [update.sides() for update in waiting.values()]
    a, b = projections(first.seed.key, first.rank, max(out for out, _ in sides), max(into for _, into in sides))
    return found | {name: replace(update, a=a, b=b) for name, update in waiting.items()}
