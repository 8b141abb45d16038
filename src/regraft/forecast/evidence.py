"""What a forecast is made from: nearness of the two bases where the adapter works, and a survey of the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from regraft.adapter import ModuleRef
from regraft.nearness import Nearness

# A share this many standard deviations above chance is no accident.
_CHANCE = 4.0


@dataclass(frozen=True)
class Survey:
    """The two bases beyond the adapter's own modules, and below their surface; see `regraft.forecast.survey`.

    Attributes:
        modules: number of modules that were read for it.
        deep: whether those are all.
        drift: mean relative drift over a sample of all paired modules.
        overlap: mean chance-corrected overlap of the leading singular subspaces of old and new weights, over a sample
            of the adapter's modules.
        added: share of the new base's modules that answer to no module of the old one.
        untrained: the new base's weights look like random draws, and the old one's do not.
    """

    modules: int
    deep: bool
    drift: float | None = None
    overlap: float | None = None
    added: float = 0.0
    untrained: bool = False


@dataclass(frozen=True)
class Evidence:
    """What the verdict is made from.

    Attributes:
        shares: adapter's module → its share of ‖ΔW‖².
        nearness: the same modules → how near the two weights are; absent where a module was not paired.
        skipped: the same modules → why they have no place in the new base.
        rotated: the same modules whose units are carried to other places, so that their raw drift says nothing.
        survey: of the bases beyond these modules, where both are at hand.
        probe: figures of activations, where both models were run.
    """

    shares: Mapping[ModuleRef, float]
    nearness: Mapping[ModuleRef, Nearness] = field(default_factory=dict)
    skipped: Mapping[ModuleRef, str] = field(default_factory=dict)
    rotated: Collection[ModuleRef] = ()
    survey: Survey | None = None
    probe: Mapping[str, float] = field(default_factory=dict)

    @property
    def resized(self) -> float:
        """Share of the update in modules that have a counterpart of another shape."""
        return sum(self.shares.get(ref, 0.0) for ref, n in self.nearness.items() if n.distance is None)

    @property
    def removed(self) -> float:
        """Share of the update in modules that have no place in the new base."""
        return sum(self.shares.get(ref, 0.0) for ref in self.skipped)

    def contained(self) -> float | None:
        """The share of the whole update that the drift holds; None where that could be chance.

        Weighted by share, the modules' figures add up to ⟨D, ΔW⟩ / ‖ΔW‖² over the whole adapter.
        """
        found = [(self.shares.get(ref, 0.0), n.contained, n.contained_noise) for ref, n in self.nearness.items()]
        known = [(share, held, noise) for share, held, noise in found if held is not None and noise is not None]
        total = sum(share * held for share, held, _ in known)
        noise = sum((share * noise) ** 2 for share, _, noise in known) ** 0.5
        return total if known and total > _CHANCE * noise else None

    def mean(self, values: Mapping[ModuleRef, float | None], *, missing: float | None = None) -> float | None:
        """Mean weighted by share; ``missing`` stands in for None, or such modules are left out."""
        pairs = [(self.shares.get(ref, 0.0), missing if value is None else value) for ref, value in values.items()]
        weights = sum(share for share, value in pairs if value is not None)
        if weights <= 0:
            known = [value for _, value in pairs if value is not None]
            return sum(known) / len(known) if known else None
        return sum(share * value for share, value in pairs if value is not None) / weights
