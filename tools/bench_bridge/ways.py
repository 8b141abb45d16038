"""Every way that is measured to get a style of v1 drawn by v3, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.bench_bridge.made import MADE, made
from tools.bench_bridge.styles import GUIDANCE, NEW, Bench, Case, Pictures

from regraft.bench import diffusion_art as art
from regraft.bridge.x_adapter.settings import MapperSettings
from regraft.runtime.room import fast_half

Way = Callable[[Case], Pictures]

TRAINED = MapperSettings(
    prompts=tuple(art.PROMPTS), pictures=384, steps=1500, look=250, precision="bf16" if fast_half() else "no"
)
#: Mappers that differ from it in one thing, seed 0.
ABLATED: dict[str, dict[str, Any]] = {
    "at equal noise, untimed (the paper's)": {"lead": 1.0, "timed": False},
    "on plain pictures alone": {"varied": 0},
    "with captions for the new base in half": {"prompted": 0.5},
    "with captions for the new base in all": {"prompted": 1.0},
    "with guided fusion": {"fusion": "guided"},
    "with SPADE fusion": {"fusion": "spade"},
    "with one level": {"levels": 1},
    "with two levels": {"levels": 2},
    "for twice as long": {"steps": 2 * TRAINED.steps},
}


def mapper_of(bench: Bench, title: str | None = None) -> Path:
    """The benchmark's mapper, or one of `ABLATED`; trained if it is missing."""
    if title is None:
        return bench.mapper("mapper", 0, TRAINED)
    return bench.mapper(title, 0, replace(TRAINED, **ABLATED[title]))


def _x_adapter(title: str | None = None, **settings: Any) -> Way:
    return lambda case: case.x_adapter(mapper_of(case.bench, title), **settings)


def _prompted(**settings: Any) -> Way:
    return lambda case: case.x_adapter(mapper_of(case.bench), new_prompt=list(case.prompts), **settings)


def _made(way: str) -> Way:
    def draw(case: Case) -> Pictures:
        mapper = mapper_of(case.bench) if way == "distilled" else None
        return case.plain(NEW, made(case, way, mapper, steps=case.bench.refine_steps))

    return draw


#: Measured for every style and seed.
WAYS: dict[str, Way] = {
    "old + LoRA": Case.teacher,
    "new alone": Case.alone,
    "native": Case.native,
    "X-Adapter": _x_adapter(),
    "delta": lambda case: case.delta(1.0),
    **{f"SDEdit from {start}": lambda case, start=start: case.sdedit(start) for start in (0.8, 0.6, 0.4)},
    **{way: _made(way) for way in MADE},
}

#: Measured for the first style and seed.
FURTHER: dict[str, Way] = {
    **{f"delta, λ {value}": lambda case, value=value: case.delta(value) for value in (0.5, 0.7, 1.3)},
    "delta, λ falling from 1.5 to 0.5": lambda case: case.delta(lambda done: 1.5 - done),
    "delta, λ rising from 0.5 to 1.5": lambda case: case.delta(lambda done: 0.5 + done),
    "X-Adapter, with the prompt and guidance": _prompted(new_guidance_scale=GUIDANCE),
    "X-Adapter, with the prompt": _prompted(),
    "X-Adapter, with guidance": _x_adapter(new_guidance_scale=GUIDANCE),
    "X-Adapter, T0 1": _x_adapter(start=1.0),
    "X-Adapter, T0 0.6": _x_adapter(start=0.6),
    "X-Adapter, read with the LoRA": _x_adapter(reading="plugged"),
    "X-Adapter, heard while drawing (the paper's)": _x_adapter(reading="drawing"),
    "X-Adapter, lead 1": _x_adapter(lead=1.0),
    "X-Adapter, lead 0.3": _x_adapter(lead=0.3),
    "X-Adapter, scale 0.7": _x_adapter(strength=0.7),
    "X-Adapter, scale 1.3": _x_adapter(strength=1.3),
}
#: The same, each by a mapper of its own.
TRAINED_OTHERWISE: dict[str, Way] = {f"X-Adapter trained {title}": _x_adapter(title) for title in ABLATED}


def wanted(*, first: bool, ablated: list[str], only: list[str] | None) -> dict[str, Way]:
    """What is to be measured for a case.

    Args:
        first: of the first style and seed.
        ablated: of `ABLATED`, the ones that are wanted.
        only: ways by name; None for all, and for those of `ABLATED` that are wanted.
    """
    found = WAYS | FURTHER | TRAINED_OTHERWISE if first else WAYS
    if only is not None:
        return {name: way for name, way in found.items() if name in only}
    trained = {f"X-Adapter trained {title}" for title in ablated}
    return {name: way for name, way in found.items() if name not in TRAINED_OTHERWISE or name in trained}
