"""How good is a ported adapter? Judged on held-out inputs that the models made themselves, without any test data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.adapter import ModuleRef
from regraft.errors import InputError
from regraft.methods.task import AdapterTask
from regraft.probes.batches import Batch, TextBatch
from regraft.runtime.applied import applied
from regraft.runtime.both import Side
from regraft.updates import Diff, Full, Update

#: What moving the new base on its own inputs counts beside missing the adapter's effect. From about 0.15 on, weaker
#: copies win that recover less.
KEEP = 0.1


@dataclass(frozen=True)
class Score:
    """A candidate's figures, each relative to the adapter's own effect, so that 0 is perfect.

    Attributes:
        task: how far its outputs are from the teacher's (old base with the adapter) on the teacher's own inputs; 1 is
            the new base alone.
        kept: how far it moved the new base on the new base's own inputs; 1 is as far as the teacher is.
    """

    task: float
    kept: float

    def total(self, weight: float = KEEP) -> float:
        """task + weight · kept: lower is better."""
        return self.task + weight * self.kept


@dataclass
class HeldOut:
    """Held-out inputs, and what both bases say on them without and with the adapter.

    Language models with the same tokens are compared by the divergence of their predictions, KL(wanted ‖ got) at every
    position; with other tokens, by how much less likely they find whole texts, which is the same divergence between
    distributions of texts, estimated on texts that the wanted one wrote. Others by squared distance.
    """

    task: AdapterTask
    batches: Sequence[Batch]
    language: bool = False
    by_text: bool = False
    _told: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)

    @torch.no_grad()
    def __post_init__(self) -> None:
        models = self.task.models
        self.language = models.old.kind == "language"
        self.by_text = any(batch.rows("old") is not None for batch in self.batches)
        if self.by_text and not self.language:
            raise InputError("the outputs of models with different tokens can't be compared", file=models.new.path)
        with applied(models.old.components, self.task.adapter):
            teacher = [self._said(batch, models.old.components, "old") for batch in self.batches]
        for batch, told in zip(self.batches, teacher, strict=True):
            base = self._said(batch, models.new.components, "new")
            if not self.language:
                # Outputs that are no distribution: wanted is the new base's, with the change that the adapter made.
                told = base + told - self._said(batch, models.old.components, "old")
            size = self._distance(told, base)
            self._told.append((told, base, size))

    def _said(self, batch: Batch, components: Mapping[str, torch.nn.Module], side: str) -> Tensor:
        models = self.task.models
        model = replace(models.old if side == "old" else models.new, components=dict(components))
        said = batch.run(model, "old" if side == "old" else "new").float()
        if self.by_text and isinstance(batch, TextBatch):
            return likelihoods(said, batch, "old" if side == "old" else "new")
        return F.log_softmax(said, -1) if self.language else said

    def _distance(self, wanted: Tensor, got: Tensor) -> float:
        if self.by_text:
            return float((wanted - got).mean())
        if self.language:
            size = min(wanted.shape[-1], got.shape[-1])
            wanted, got = wanted[..., :size], got[..., :size]
            return float((wanted.exp() * (wanted - got)).sum(-1).mean())
        return float((wanted - got).square().mean())

    @torch.no_grad()
    def score(self, updates: Mapping[ModuleRef, Update]) -> Score:
        """Of a ported adapter's updates, by the new base's names."""
        models = self.task.models
        sums = {"task": [0.0, 0.0], "kept": [0.0, 0.0]}
        with applied(models.new.components, replace(self.task.adapter, updates=updates)):
            for batch, (told, base, size) in zip(self.batches, self._told, strict=True):
                got = self._said(batch, models.new.components, "new")
                if batch.made_by in ("adapter", "given"):
                    sums["task"][0] += len(batch) * self._distance(told, got)
                    sums["task"][1] += len(batch) * size
                if batch.made_by in ("new", "given"):
                    sums["kept"][0] += len(batch) * self._distance(base, got)
                    sums["kept"][1] += len(batch) * self._distance(base, told)
        figures = {name: got / most if most > 0 else 0.0 for name, (got, most) in sums.items()}
        return Score(**figures)


def likelihoods(logits: Tensor, batch: TextBatch, side: Side) -> Tensor:
    """Log-likelihood of each text between the first and the last place where tokens of both models end, (n,) in nats.

    Args:
        logits: (n, positions, vocabulary).
        batch: texts in the tokens of both.
        side: whose tokens the logits are of.
    """
    ids = batch.ids[side].to(logits.device)
    said = F.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (said * between(batch, side).to(said.device)).sum(1)


def between(batch: TextBatch, side: Side) -> Tensor:
    """Which tokens, from the second on, `likelihoods` counts, (n, positions − 1)."""
    rows = batch.rows(side)
    n, positions = batch.ids[side].shape
    if rows is None:
        return torch.ones(n, positions - 1, dtype=torch.bool)
    texts, places = rows // positions, rows % positions
    first = torch.full((n,), positions).scatter_reduce(0, texts, places, "amin")
    last = torch.zeros(n, dtype=torch.long).scatter_reduce(0, texts, places, "amax")
    at = torch.arange(positions - 1)
    # What stands at a place foretells the token behind it.
    return (at >= first[:, None]) & (at < last[:, None])


def scaled(updates: Mapping[ModuleRef, Update], strength: float) -> dict[ModuleRef, Update]:
    """Every update of a layer at another strength; parameters that are stored whole, or as a difference, stay."""
    return {ref: u if isinstance(u, Full | Diff) else u.scaled(strength) for ref, u in updates.items()}


def lowest(strengths: Sequence[float], totals: Sequence[float]) -> float:
    """Where a parabola through the best strength and its neighbours is lowest."""
    best = min(range(len(totals)), key=totals.__getitem__)
    if best in (0, len(totals) - 1):
        return strengths[best]
    (a, b, c), (x, y, z) = strengths[best - 1 : best + 2], totals[best - 1 : best + 2]
    top = (b - a) ** 2 * (y - z) - (b - c) ** 2 * (y - x)
    below = (b - a) * (y - z) - (b - c) * (y - x)
    return b - 0.5 * top / below if below else b
