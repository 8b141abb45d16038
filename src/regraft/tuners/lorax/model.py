"""Models with LoRA-X on them."""

from __future__ import annotations

from regraft.tuners._prints import PrintedModel
from regraft.tuners.lorax.layer import LoraXLayer


class LoraXModel(PrintedModel):
    """A model with LoRA-X adapters; U and V are computed from its weights, once per layer."""

    prefix: str = "lorax_"
    tuner_layer_cls = LoraXLayer
