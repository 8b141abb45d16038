"""Inputs that tell what the new base is to leave as it was: those that it made itself."""

from __future__ import annotations

from regraft.probes.batches import Batch, Batches, make_batches
from regraft.refine.settings import RefineSettings
from regraft.runtime.both import BothModels


def with_own(found: Batches, models: BothModels, settings: RefineSettings) -> Batches:
    """Inputs by the old base, and half as many to fit on by the new one; given ones stay alone.

    Args:
        found: what `make_batches` gave.
        models: both bases.
        settings: whether there is any retention, and the seed and prompts.
    """
    if settings.kept == 0 or all(batch.made_by == "given" for batch in found.fit):
        return found
    n = sum(len(batch) for batch in found.fit)
    more = make_batches(models, None, max(2, n // 2), settings.seed + 1, settings.prompts, held_out=0)
    own: list[Batch] = [batch for batch in more.fit if batch.made_by == "new"]
    made = f"{found.made}; {sum(len(batch) for batch in own)} more from the new base, for retention"
    return Batches((*found.fit, *own), found.held_out, made)
