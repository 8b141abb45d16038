"""Models with FouRA on them."""

from __future__ import annotations

from regraft.tuners._model import TunedModel, tuned_layers
from regraft.tuners.foura.layer import FouraLayer


class FouraModel(TunedModel):
    """A model with FouRA adapters. Several active ones add their outputs, which is how the paper merges adapters."""

    prefix: str = "foura_"
    tuner_layer_cls = FouraLayer

    def freeze_gate(self, adapter_name: str = "default") -> dict[str, int]:
        """Fix an adaptive gate: the directions that were open for at least half of what training has seen stay open.

        From then on the adapter is a plain low-rank change: it can be merged, converted and carried over. What is lost
        is that other inputs open other directions.

        Args:
            adapter_name: which.

        Returns:
            By module, how many directions stay open.

        Raises:
            ValueError: there is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"there is no adapter {adapter_name!r}; there are {', '.join(self.peft_config)}")
        kept = {}
        for _, layer in tuned_layers(self.model, FouraLayer):
            layer.freeze_gate(adapter_name)
            if adapter_name in layer.foura_mask:
                kept[layer.key] = int(layer.foura_mask[adapter_name].sum())
        if kept:
            self.peft_config[adapter_name].gate = "frozen"
        return kept
