"""Layers of FouRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from regraft.frequency import folded_down, folded_up, frequencies
from regraft.tuners._layer import CONVOLUTIONS, Buffers, TunedLayer, check_matrix_layer, is_conv1d
from regraft.tuners.foura.config import FouraConfig
from regraft.tuners.foura.gate import adaptive_mask

# How fast the record of what the gate lets through forgets.
_MOMENTUM = 0.99


class FouraLayer(TunedLayer):
    """x ↦ W x + F⁻¹(B · s · mask · A F(x)), s = foura_alpha / r, F over the channels.

    Attributes:
        foura_a: A, (r, n), (r, n, kh, kw) of a convolution; complex ones have n // 2 + 1 and a last dimension of 2.
        foura_b: B, (m, r); complex ones (m // 2 + 1, r, 2).
        foura_gate: G of an adaptive gate, (r, r).
        foura_usage: how often an adaptive gate has let each direction through in training, (r,), 0 to 1.
        foura_mask: of a frozen gate, (r,), 0 or 1.
        foura_size: (m, n) where A and B alone don't tell them.
    """

    title = "FouRA"
    adapter_layer_names: tuple[str, ...] = ("foura_a", "foura_b", "foura_gate")
    buffer_names = ("foura_usage", "foura_mask", "foura_size")
    foura_a: nn.ParameterDict
    foura_b: nn.ParameterDict
    foura_gate: nn.ParameterDict
    foura_usage: Buffers
    foura_mask: Buffers
    foura_size: Buffers

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: FouraConfig, key: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, key, **kwargs)
        self.options: dict[str, FouraConfig] = {}

    @classmethod
    def check(cls, base_layer: nn.Module, config: FouraConfig, key: str) -> None:
        check_matrix_layer(base_layer, key, cls.title, in_groups="its channels are apart")

    def add(self, adapter_name: str, config: FouraConfig) -> None:
        base = self.get_base_layer()
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, self.key), config.r)
        most = min(self.in_features, self.out_features)
        if rank > most:
            raise ValueError(f"{self.key}: r = {rank} is above {most}, the smaller side of its weight: give a lower r")
        kernel = tuple(base.kernel_size) if isinstance(base, CONVOLUTIONS) else ()
        parts = () if config.transform == "dct" else (2,)
        ins, outs = (frequencies(size, config.transform) for size in (self.in_features, self.out_features))
        bound = 1 / math.sqrt(self.in_features * math.prod(kernel) * (1 + len(parts)))
        down = torch.empty(rank, ins, *kernel, *parts).uniform_(-bound, bound)
        up = torch.zeros(outs, rank, *parts)
        if not config.init_weights:
            up.normal_(0.0, 0.02)
        self.options[adapter_name] = config
        self.foura_a[adapter_name] = nn.Parameter(down)
        self.foura_b[adapter_name] = nn.Parameter(up)
        if config.transform == "fft":
            self.foura_size.put(adapter_name, torch.tensor([self.out_features, self.in_features]), stored=True)
        if config.gate == "adaptive":
            self.foura_gate[adapter_name] = nn.Parameter(torch.randn(rank, rank) / math.sqrt(rank))
            self.foura_usage.put(adapter_name, torch.ones(rank), stored=True)
        elif config.gate == "frozen":
            self.foura_mask.put(adapter_name, torch.ones(rank), stored=True)
        if is_conv1d(base) and self.key not in config.conv1d_modules:
            config.conv1d_modules.append(self.key)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.options.pop(adapter_name, None)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """F⁻¹ B, (m, r), and A F, (r, n, …), float32; of ``fft`` both of 2 r."""
        transform = self.options[name].transform
        up = folded_up(self.foura_b[name], self.out_features, transform)
        return up, folded_down(self.foura_a[name], self.in_features, transform)

    def strength(self, name: str) -> float:
        """The whole factor before the change."""
        return self.scaling[name] * self.options[name].foura_alpha / int(self.foura_b[name].shape[1])

    def _check_gates(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.foura_gate:
                raise ValueError(
                    f"{self.key}: the gate of the adapter {name} depends on the input, so that its change is no "
                    f"matrix: fix the mask first, by model.base_model.freeze_gate({name!r})"
                )

    def delta(self, names: Sequence[str]) -> Tensor:
        self._check_gates(names)
        total = torch.stack([self._matrix(name) for name in names]).sum(0)
        return total.mT if is_conv1d(self.get_base_layer()) else total

    def _matrix(self, name: str) -> Tensor:
        up, down = self.factors(name)
        if name in self.foura_mask:
            up = up * self._doubled(self.foura_mask[name].float(), name)
        product: Tensor = torch.tensordot(up, down, 1)
        return self.strength(name) * product

    def _doubled(self, mask: Tensor, name: str) -> Tensor:
        """A mask (…, r) for real and imaginary parts, (…, 2 r); itself where there are none."""
        return mask if self.options[name].transform == "dct" else torch.cat([mask, mask], -1)

    def effect(self, x: Tensor, names: Sequence[str]) -> Tensor:
        parts = [self._effect(x, name) for name in names]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _effect(self, x: Tensor, name: str) -> Tensor:
        base, dtype = self.get_base_layer(), self.foura_a[name].dtype
        up, down = (factor.to(dtype) for factor in self.factors(name))
        x = self._cast_input_dtype(x, dtype)
        if not isinstance(base, CONVOLUTIONS):
            return self.strength(name) * (self._gated(x @ down.mT, name) @ up.mT)
        channel = -len(base.kernel_size) - 1
        seen = base._conv_forward(x, down, None).movedim(channel, -1)
        return self.strength(name) * (self._gated(seen, name) @ up.mT).movedim(-1, channel)

    def _gated(self, seen: Tensor, name: str) -> Tensor:
        """The rank directions (…, r), of ``fft`` (…, 2 r), with those that are closed set to 0."""
        if name in self.foura_mask:
            return seen * self._doubled(self.foura_mask[name].to(seen.dtype), name)
        if name not in self.foura_gate:
            return seen
        own, gate = self.options[name], self.foura_gate[name]
        read = seen
        if own.transform == "fft":
            read = torch.stack(seen.chunk(2, -1)).square().sum(0).add(1e-12).sqrt()
        mask = adaptive_mask(read, gate, own.gate_threshold, own.gate_sharpness)
        # An expert may get no token, of which there is no mean.
        if self.training and torch.is_grad_enabled() and mask.numel():
            with torch.no_grad():
                usage = self.foura_usage[name]
                usage.lerp_(mask.detach().reshape(-1, mask.shape[-1]).mean(0).to(usage.dtype), 1 - _MOMENTUM)
        return seen * self._doubled(mask, name)

    @torch.no_grad()
    def freeze_gate(self, adapter_name: str) -> None:
        """Put a fixed mask in the place of an adaptive gate: what was open at least half of the time stays open."""
        if adapter_name not in self.foura_gate:
            return
        self.foura_mask.put(adapter_name, (self.foura_usage[adapter_name] >= 0.5).float(), stored=True)
        del self.foura_gate[adapter_name], self.foura_usage[adapter_name]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts matrices; an adaptive gate's change is none."""
        return adapter_name not in self.foura_gate and not isinstance(self.get_base_layer(), CONVOLUTIONS)
