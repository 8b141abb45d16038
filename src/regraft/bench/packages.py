"""Pairs of real bases out of packages: sentence encoders and protein encoders, trained by others."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from regraft.bench.receptors import ReceptorProbe, ReceptorWorld
from regraft.bench.sentiment import SentimentWorld
from regraft.bench.worlds import PairSpec, Scorer, Which
from regraft.runtime import Loaded


class PackagesWorld:
    """See `regraft.bench.worlds.World`. Packages are fetched by pip at exact versions, on first use."""

    pairs: tuple[PairSpec, ...] = (*SentimentWorld.pairs, *ReceptorWorld.pairs)

    def __init__(self, cache: Path) -> None:
        self._sentiment, self._receptors = SentimentWorld(cache), ReceptorWorld(cache)

    def _world(self, pair: str) -> SentimentWorld | ReceptorWorld:
        return self._receptors if pair.startswith("sceptr") else self._sentiment

    def base(self, pair: str, which: Which) -> Path:
        return self._world(pair).base(pair, which)

    def adapter(self, pair: str, name: str, seed: int) -> Path:
        return self._world(pair).adapter(pair, name, seed)

    def native(self, pair: str, name: str, seed: int) -> Path:
        return self._world(pair).native(pair, name, seed)

    def scorer(self, pair: str, which: Which, name: str) -> AbstractContextManager[Scorer]:
        return self._world(pair).scorer(pair, which, name)

    def inputs(self, pair: str) -> dict[str, Any]:
        return self._world(pair).inputs(pair)

    def loaded(self, pair: str, which: Which) -> Loaded:
        """See `regraft.bench.group.Group.model`."""
        return self._world(pair).loaded(pair, which)

    def probe(self, pair: str, seed: int) -> ReceptorProbe | None:
        """Inputs that `regraft.probes` doesn't know how to make; None where it does."""
        world = self._world(pair)
        return world.probe(pair, seed) if isinstance(world, ReceptorWorld) else None
