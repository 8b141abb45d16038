"""Which base of a folder is the one that an adapter is for: by fingerprint, by its components, or by its sketch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from regraft.fingerprint import parse_brief
from regraft.likeness import compare_sketches
from regraft.lineage.model import BaseId


@dataclass(frozen=True)
class Recognised:
    """A base of the folder, and by what it was known; ``how`` is empty for equal fingerprints."""

    base: BaseId
    how: str = ""


def recognise(base: BaseId, known: Mapping[str, BaseId], components: Collection[str] = ()) -> Recognised:
    """The known base that ``base`` is, or ``base`` itself where it is none of them, or could be several.

    Args:
        base: of a lineage, or from disk.
        known: by fingerprint.
        components: those that matter; a text encoder's change is nothing to an adapter of the U-Net. By default all.
    """
    if base.fingerprint in known:
        return Recognised(known[base.fingerprint])
    needed = set(components) or set(base.components)
    alike = [other for other in known.values() if needed and all(_same_sample(base, other, name) for name in needed)]
    if len(alike) == 1:
        return Recognised(alike[0], f"its {', '.join(sorted(needed))} has equal weights")
    if alike:
        return Recognised(base)
    rounded = [other for other in known.values() if same_up_to_rounding(base, other)]
    if len(rounded) == 1:
        return Recognised(rounded[0], "its weights are equal up to rounding, by the sketch")
    return Recognised(base)


def _same_sample(base: BaseId, other: BaseId, name: str) -> bool:
    """Whether a component has equal weights in two bases.

    A component alone is called ``model`` by one reader and ``unet`` or ``transformer`` by another, which makes two
    strings of one fingerprint; its sample, the hash of its tensors' own names and values, is the same.
    """
    mine, theirs = (_alone(which) or which.components.get(name) for which in (base, other))
    if mine is None:
        return False
    return mine == theirs or (_alone(base) is not None and mine in other.components.values())


def _alone(base: BaseId) -> str | None:
    return next(iter(base.components.values())) if len(base.components) == 1 else None


def same_up_to_rounding(first: BaseId, second: BaseId) -> bool:
    """Whether two bases of one structure have brief sketches that agree."""
    if first.sketch is None or second.sketch is None or first.structure != second.structure:
        return False
    try:
        (component, old), (other, new) = parse_brief(first.sketch), parse_brief(second.sketch)
    except ValueError:
        return False
    return component == other and compare_sketches(old, new).verdict == "same"
