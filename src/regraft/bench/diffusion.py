"""The diffusion world: the demo's Stable Diffusion v1 and what became of it, with styles and a few-step adapter."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.bench import diffusion_art as art
from regraft.bench.diffusion_recipes import ADAPTERS
from regraft.bench.diffusion_score import scoring
from regraft.bench.diffusion_train import Workshop
from regraft.bench.worlds import PairSpec, Scorer, Which
from regraft.errors import InputError

OLD = "v1"
DEV = tuple((name, 100) for name in ADAPTERS if name.startswith("amber"))
"""Adapters and seeds that methods may be tuned on, on every pair; never among those reported."""

_STYLES = ("cyano", "woodcut", "riso-dora")
_ALL = ("cyano", "riso-dora", "blueprint-conv", "few-step")


@dataclass(frozen=True)
class _Made:
    """A pair, and the name of its new base in the workshop."""

    spec: PairSpec
    new: str


def _pair(
    name: str, new: str, relation: Any, expects: Any, adapters: tuple[str, ...], about: str, seeds: int = 1
) -> _Made:
    return _Made(PairSpec(name, "diffusion", relation, expects, about, adapters, tuple(range(seeds))), new)


_PAIRS = [
    _pair("sd-near-1", "near-1", "near", "near", (*_STYLES, "few-step"), "v1 trained on another art (drift 0.09)"),
    _pair("sd-near-2", "near-2", "near", "near", _ALL, "v1 trained on another art, text encoder too (drift 0.15)", 3),
    _pair("sd-drift", "v2", "drift", "strong", _STYLES, "the demo's v2: v1 trained on another art (drift 0.39)"),
    _pair("sd-pruned", "pruned", "pruned", "pruned", _ALL, "three of v1's seven transformer blocks removed, healed", 3),
    _pair("sd-grown", "grown", "deeper", "grown", _STYLES, "v1's transformer blocks doubled, trained on another art"),
    _pair("sd-scratch", "v2-retrained", "scratch", "far", _STYLES, "the demo's v2-retrained: v1's shapes, new weights"),
    _pair("sd-other", "v3", "scratch", "far", _STYLES, "the demo's v3: other width, depth and autoencoder"),
]


class DiffusionWorld:
    """See `regraft.bench.worlds.World`; everything is trained on first use and kept under ``cache``."""

    pairs: tuple[PairSpec, ...] = tuple(made.spec for made in _PAIRS)

    def __init__(self, cache: Path) -> None:
        self.shop = Workshop(cache)

    def base(self, pair: str, which: Which) -> Path:
        """A diffusers folder."""
        return self.shop.base(_name(pair, which))

    def adapter(self, pair: str, name: str, seed: int) -> Path:
        """The adapter on v1: one file for all pairs."""
        _name(pair, "old")
        return self.shop.adapter(OLD, name, seed)

    def native(self, pair: str, name: str, seed: int) -> Path:
        """The same recipe, pictures and number of steps on the pair's new base."""
        return self.shop.adapter(_name(pair, "new"), name, seed)

    def trained_in(self, pair: str, name: str, seed: int) -> float | None:
        """Seconds of the native adapter's training by its log; None where that is lost."""
        log = self.shop.work("adapter", _name(pair, "new"), name, str(seed)).with_suffix(".log")
        if not log.is_file():
            return None
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        # Each line is the mean over the steps since the one before it.
        starts = [0, *(line["step"] for line in lines)]
        parts = zip(lines, starts[:-1], strict=True)
        return sum((line["step"] - start) * line["seconds_per_step"] for line, start in parts) or None

    def scorer(self, pair: str, which: Which, name: str) -> AbstractContextManager[Scorer]:
        """See `regraft.bench.diffusion_score.scoring`."""
        return scoring(self.shop, _name(pair, which), _name(pair, "new"), name)

    def inputs(self, pair: str) -> dict[str, Any]:
        """Prompts such as the bases know, other than those that pictures are judged on."""
        grounds = list(art.BACKGROUNDS)
        return {
            "prompts": [
                f"{concept} on {grounds[(place + shift) % len(grounds)]}"
                for shift in (0, 2)
                for place, concept in enumerate(art.CONCEPTS)
            ]
        }


def _name(pair: str, which: Which) -> str:
    for made in _PAIRS:
        if made.spec.name == pair:
            return OLD if which == "old" else made.new
    raise InputError(f"no diffusion pair is named {pair!r}", remedy=f"Known: {', '.join(m.spec.name for m in _PAIRS)}.")
