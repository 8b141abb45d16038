"""Models with LoRA-X on them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regraft.tuners._model import CombinableModel
from regraft.tuners._prints import checked_prints
from regraft.tuners.lorax.config import LoraXConfig
from regraft.tuners.lorax.layer import LoraXLayer


class LoraXModel(CombinableModel):
    """A model with LoRA-X adapters; U and V are computed from its weights, once per layer."""

    prefix: str = "lorax_"
    tuner_layer_cls = LoraXLayer

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoraXConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found: dict[str, Any] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return checked_prints(model, LoraXLayer, adapter_name, found)
