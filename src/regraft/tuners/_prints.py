"""Layers whose adapters belong to one base, told by a print of its weight: LoRA-X and SVDiff."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from regraft.singular import moved, strayed
from regraft.tuners._layer import Buffers, TunedLayer
from regraft.tuners._model import CombinableModel, tuned_layers


class PrintedLayer(TunedLayer):
    """A layer that refuses an adapter of another base.

    Attributes:
        own_prints: by adapter, the print of this base's weight and whether another one will do.
        told: adapters that were held against the base with all of their layers together.
    """

    #: Name of the buffers that hold the prints of the adapters' files.
    print_name: ClassVar[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, key: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, key, **kwargs)
        self.own_prints: dict[str, tuple[Tensor, bool]] = {}
        self._confirmed: dict[str, tuple[int, int]] = {}
        self.told: set[str] = set()

    @property
    def prints(self) -> Buffers:
        """By adapter, the print that its file has."""
        found: Buffers = getattr(self, self.print_name)
        return found

    def put_print(self, adapter_name: str, found: Tensor, *, port: bool) -> None:
        """Note this base's print for a new adapter, which may be of another base where ``port`` is set."""
        self.prints.put(adapter_name, found, stored=True)
        self.own_prints[adapter_name] = (found.cpu(), port)
        self._confirmed.pop(adapter_name, None)
        self.told.discard(adapter_name)

    def refusal(self, adapter_name: str, stored: Tensor) -> str | None:
        """Why an adapter with this print can't be on this base; None where it can."""
        own, port = self.own_prints[adapter_name]
        wrong = "the prints have other lengths" if stored.shape != own.shape else moved(stored, own)
        if wrong is None or port:
            return None
        return (
            f"{self.key}: the base is not the one that this {self.title} adapter was trained on ({wrong}). Load that "
            f"one, in the dtype of the training, or carry the adapter over with `regraft port`; in its config "
            f"base_changed='port' applies its numbers to this base's singular directions by their index."
        )

    def confirm(self, names: Sequence[str]) -> None:
        for name in names:
            stored = self.prints[name]
            # Loaders other than PEFT's put tensors into a layer without a word: a new one is looked at once.
            state = (id(stored), stored._version)
            if self._confirmed.get(name) != state and stored.device.type != "meta":
                why = self.refusal(name, stored)
                if why is not None:
                    raise ValueError(why)
                if name not in self.told:
                    self.warn([(stored, self.own_prints[name])])
                self.settle(name)
                self._confirmed[name] = (id(self.prints[name]), self.prints[name]._version)

    @classmethod
    def warn(cls, prints: Sequence[tuple[Tensor, tuple[Tensor, bool]]]) -> None:
        """Warn where a base is near to an adapter's own, and not the same.

        Args:
            prints: of each weight the adapter's, and `own_prints` of the base.
        """
        said = strayed([(stored, own) for stored, (own, port) in prints if not port], cls.title)
        if said is not None:
            warnings.warn(said, stacklevel=3)

    def settle(self, adapter_name: str) -> None:
        """Do what is to be done once when an adapter's tensors have come."""


class PrintedModel(CombinableModel):
    """A model of a tuner with such layers: what is loaded is held against its base."""

    tuner_layer_cls: type[PrintedLayer]

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found: dict[str, Any] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return checked_prints(model, cls.tuner_layer_cls, adapter_name, found)


def checked_prints(
    model: nn.Module, kind: type[PrintedLayer], adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A state dict that fits the base that it is loaded on; where it is a port, with that base's own prints.

    Args:
        model: with the adapter's layers on it.
        kind: the tuner's layers.
        adapter_name: the adapter that is loaded.
        state_dict: with the model's own keys.

    Raises:
        ValueError: a stored print is of another weight than the base's.

    Warns:
        UserWarning: all of them together are further from the base's than rounding brings them.
    """
    result = dict(state_dict)
    met: list[tuple[Tensor, tuple[Tensor, bool]]] = []
    for name, layer in tuned_layers(model, kind):
        key = f"{name}.{kind.print_name}.{adapter_name}"
        if key not in result or adapter_name not in layer.own_prints:
            continue
        why = layer.refusal(adapter_name, result[key])
        if why is not None:
            raise ValueError(why)
        met.append((result[key], layer.own_prints[adapter_name]))
        layer.told.add(adapter_name)
        own, port = layer.own_prints[adapter_name]
        result[key] = own.clone() if port else result[key]
    kind.warn(met)
    return result
