"""Puts a tuner's layers in place of a model's own: what the models of all three tuners have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from regraft.tuners._layer import TunedLayer


class TunedModel(BaseTuner):
    """A model with one of the tuners on it; PEFT makes it, by `peft.get_peft_model` and the like."""

    tuner_layer_cls: type[TunedLayer]
    if TYPE_CHECKING:
        # PEFT's, which mypy doesn't see behind what torch.nn.Module says of any name.
        model: nn.Module
        active_adapters: list[str]
        peft_config: dict[str, Any]
        inject_adapter: Callable[..., None]
        delete_adapter: Callable[[str], None]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            self.tuner_layer_cls.check(target.get_base_layer(), peft_config, current_key)
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        self.tuner_layer_cls.check(base, peft_config, current_key)
        layer = self.tuner_layer_cls(target, adapter_name, peft_config, current_key, **get_quantization_kwargs(self))
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            # A further adapter is not trained until it is made the active one.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if not isinstance(new_module, self.tuner_layer_cls):
            # The base layer comes back as it is: PEFT would look for a weight, which HQQ's layers have under another
            # name.
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops the argument where a tuner doesn't look at it: all samples would get the active adapters.
        if kwargs.get("adapter_names") is not None:
            what = "an adapter for each sample of a batch (adapter_names) is for PEFT's LoRA"
            raise ValueError(f"{what}: with {self.tuner_layer_cls.title}, set_adapter chooses for all of them")
        yield

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the strength of an adapter on every layer."""
        for _, layer in tuned_layers(self.model, self.tuner_layer_cls):
            layer.set_scale(adapter_name, scale)


class CombinableModel(TunedModel):
    """A model of a tuner whose adapters on one base add up number by number."""

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Make a new adapter whose numbers are a weighted sum of others'.

        For SVDiff weights of 1 and 1 add two adapters, relu(σ + δ₁ + δ₂), and α and 1 − α interpolate between them
        (arXiv 2303.11305, eq. 4 and 5).

        Args:
            adapters: names, all of the same options.
            weights: one for each.
            adapter_name: of the new one.

        Raises:
            ValueError: there are no such adapters, they don't change the same modules in the same way, or the name is
                taken.
        """
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters need as many weights, not {len(weights)}")
        missing = [name for name in adapters if name not in self.peft_config]
        if missing or adapter_name in self.peft_config:
            wrong = f"there is no adapter {missing[0]!r}" if missing else f"the name {adapter_name!r} is taken"
            raise ValueError(f"{wrong}; there are {', '.join(self.peft_config)}")
        layers = [layer for _, layer in tuned_layers(self.model, self.tuner_layer_cls)]
        names = self.tuner_layer_cls.adapter_layer_names
        for layer in layers:
            shapes = {
                tuple(tensors[name].shape if name in tensors else () for tensors in (getattr(layer, n) for n in names))
                for name in adapters
            }
            if len(shapes) > 1:
                raise ValueError(f"{layer.key}: {', '.join(adapters)} don't change it in the same way")
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapters[0]])
        try:
            self.inject_adapter(self.model, adapter_name)
            for layer in layers:
                if adapter_name in layer.scaling:
                    layer.align([adapter_name, *adapters])
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
        for layer in layers:
            for tensors in (getattr(layer, name) for name in names):
                if adapter_name in tensors:
                    parts = [weight * tensors[name].data for name, weight in zip(adapters, weights, strict=True)]
                    tensors[adapter_name].data = torch.stack(parts).sum(0)


def tuned_layers(model: nn.Module, kind: type[TunedLayer]) -> Iterator[tuple[str, Any]]:
    """Path and layer of every layer of a tuner."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, kind))


def base_modules(model: nn.Module) -> dict[str, Any]:
    """Path → module of a base's own modules, itself included; of one that adapters are on, what lies under them."""
    found: dict[str, Any] = {}
    tuned = ""
    for name, module in model.named_modules():
        if tuned and name.startswith(tuned):
            continue
        found[name] = module
        if isinstance(module, BaseTunerLayer):
            tuned, found[name] = f"{name}.", module.get_base_layer()
    return found
