"""Models with SVDiff on them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regraft.tuners._model import CombinableModel
from regraft.tuners._prints import checked_prints
from regraft.tuners.svdiff.config import SvdiffConfig
from regraft.tuners.svdiff.layer import SvdiffLayer


class SvdiffModel(CombinableModel):
    """A model with SVDiff adapters; its weights are decomposed once per layer."""

    prefix: str = "svdiff_"
    tuner_layer_cls = SvdiffLayer

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SvdiffConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found: dict[str, Any] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return checked_prints(model, SvdiffLayer, adapter_name, found)
