"""Which block of the old denoiser speaks to which of the new one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from regraft.bridge.x_adapter.mapper import Fusion, Level, MapperConfig
from regraft.bridge.x_adapter.places import Place, places_of
from regraft.errors import InputError
from regraft.runtime.load import Loaded

# Levels of the paper: the old decoder's last three blocks.
_LEVELS = 3


def mapper_config(
    old: Loaded,
    new: Loaded,
    levels: int | Sequence[tuple[str, str]] | None = None,
    *,
    blocks: int = 3,
    fusion: Fusion = "add",
    timed: bool = False,
    lead: float = 1.0,
) -> MapperConfig:
    """The mapper of two models, from what their decoders look like.

    Args:
        old: the base that plug-ins were made for.
        new: the base that is bridged to.
        levels: how many of the old decoder's last blocks speak, or pairs of blocks (paths in the old and the new
            denoiser); None: three, or as many as there are.
        blocks: residual blocks of a level.
        fusion: how a level joins.
        timed: whether the mapper is told noise levels.
        lead: least share of the new base's noise that the old one is to see in training.

    Raises:
        InputError: there are no such blocks, or too few that can be paired.
    """
    from_places, to_places = places_of(old), places_of(new)
    if levels is None:
        levels = min(_LEVELS, len(_speaking(from_places)), len(to_places))
    if isinstance(levels, int):
        pairs = paired(from_places, to_places, levels, new)
    else:
        pairs = [(_named(a, from_places, old), _named(b, to_places, new)) for a, b in levels]
    found = tuple(_level(a, b) for a, b in pairs)
    return MapperConfig(found, blocks, fusion, timed, lead)


def paired(old: Sequence[Place], new: Sequence[Place], n: int, model: Loaded) -> list[tuple[Place, Place]]:
    """The last ``n`` of the old places, each with one of the new ones, in order.

    Of all ways to do so the one is taken whose maps differ least in size, in doublings of a picture's side; among
    equal ones the one that joins earliest, so that as much as possible of the new decoder hears of it. For SD 1.5 and
    SDXL these are the levels of the released X-Adapter: up blocks 1, 2, 3 → mid block, up blocks 0, 1.

    Args:
        old: places of the old denoiser.
        new: of the new one.
        n: how many.
        model: that ``new`` belongs to.

    Raises:
        InputError: one of them has fewer.
    """
    speaking = _speaking(old)[-n:]
    if n < 1 or len(speaking) < n or len(new) < n:
        what = f"{n} levels can't be paired: the old base offers {len(speaking)} blocks, the new one {len(new)}"
        raise InputError(what, file=model.path, remedy="Ask for fewer levels.")

    def cost(chosen: Sequence[Place]) -> tuple[float, float]:
        apart = sum(abs(math.log2(b.cells / a.cells)) for a, b in zip(speaking, chosen, strict=True))
        return round(apart, 6), sum(place.depth for place in chosen)

    ways: list[Sequence[Place]] = list(combinations(new, n))
    best = min(range(len(ways)), key=lambda i: cost(ways[i]))
    return list(zip(speaking, ways[best], strict=True))


def _speaking(places: Sequence[Place]) -> list[Place]:
    """The middle of a U-Net is no part of its decoder; of a transformer every offered block is."""
    return [place for place in places if place.module != "mid_block"]


def _named(module: str, places: Sequence[Place], model: Loaded) -> Place:
    found = next((place for place in places if place.module == module), None)
    if found is None:
        raise InputError(
            f"the denoiser has no block {module} that could be paired",
            file=model.path,
            remedy=f"One of {', '.join(place.module for place in places)}.",
        )
    return found


def _level(old: Place, new: Place) -> Level:
    return Level(old.module, new.module, old.channels, new.channels, grows=new.cells >= 2 * old.cells)
