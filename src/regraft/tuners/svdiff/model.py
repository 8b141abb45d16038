"""Models with SVDiff on them."""

from __future__ import annotations

from regraft.tuners._prints import PrintedModel
from regraft.tuners.svdiff.layer import SvdiffLayer


class SvdiffModel(PrintedModel):
    """A model with SVDiff adapters; its weights are decomposed once per layer."""

    prefix: str = "svdiff_"
    tuner_layer_cls = SvdiffLayer
