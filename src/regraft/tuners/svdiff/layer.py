"""Layers of SVDiff."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from regraft.singular import print_of
from regraft.tuners._layer import CONVOLUTIONS, Buffers, check_layer, is_conv1d
from regraft.tuners._prints import PrintedLayer
from regraft.tuners._vectors import vectors_of
from regraft.tuners.svdiff.config import SvdiffConfig

_TAKES = {
    "Linear": (nn.Linear,),
    "Conv1D of transformers": (Conv1D,),
    "Conv1d, Conv2d, Conv3d": CONVOLUTIONS,
    "Embedding": (nn.Embedding,),
    "norms and others with a weight of one dimension": (),
}


class SvdiffLayer(PrintedLayer):
    """W' = U diag(relu(σ + Σ s · δ)) Vᵀ on the weight as it is stored, (m, n); a kernel is (out, in · kh · kw).

    Several active adapters add their shifts before the relu (arXiv 2303.11305, eq. 4).

    Attributes:
        svdiff_delta: δ, the trained numbers: (min(m, n),), largest singular value first; (n,) or (1,) on a vector.
        svdiff_print: a few numbers that tell the base, (8,): see `regraft.singular.print_of`.
        svdiff_u: (m, min(m, n)) from the base, float32; ``svdiff_s`` and ``svdiff_v`` likewise.
            A vector of n is (1, n).
    """

    title = "SVDiff"
    print_name = "svdiff_print"
    noted_names = ("own_prints",)
    adapter_layer_names: tuple[str, ...] = ("svdiff_delta",)
    buffer_names = ("svdiff_print",)
    svdiff_delta: nn.ParameterDict
    svdiff_print: Buffers
    svdiff_u: Tensor | None
    svdiff_s: Tensor
    svdiff_v: Tensor

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SvdiffConfig, key: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, key, **kwargs)
        # One decomposition serves all adapters.
        for part in ("svdiff_u", "svdiff_s", "svdiff_v"):
            self.register_buffer(part, None, persistent=False)

    @classmethod
    def check(cls, base_layer: nn.Module, config: SvdiffConfig, key: str) -> None:
        weight = getattr(base_layer, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.is_floating_point():
            return
        check_layer(base_layer, key, cls.title, takes=_TAKES)
        if isinstance(base_layer, nn.Embedding) and base_layer.max_norm is not None:
            raise TypeError(
                f"{key}: SVDiff can't change an Embedding with max_norm, which rewrites its weight as it runs"
            )

    @property
    def on_vector(self) -> bool:
        """Whether the weight has one dimension."""
        return self.quantization_backend is None and self.get_base_layer().weight.dim() == 1

    def add(self, adapter_name: str, config: SvdiffConfig) -> None:
        weight = self.float_weight()
        count = shift_count(weight.shape, config.norm_shift)
        self._decompose(weight, config)
        start = torch.zeros(count) if config.init_weights else 0.02 * torch.randn(count)
        self.svdiff_delta[adapter_name] = nn.Parameter(start)
        self.put_print(adapter_name, print_of(weight), port=config.base_changed == "port")

    def _decompose(self, weight: Tensor, config: SvdiffConfig) -> None:
        others = [own for own, _ in self.own_prints.values()]
        if self.svdiff_u is not None and others and torch.equal(others[0], print_of(weight)):
            return
        with self.naming():
            u, s, v = vectors_of(weight, None, config.svd_cache)
        self.svdiff_u, self.svdiff_s, self.svdiff_v = (part.float().to(weight.device) for part in (u, s, v))

    def change(self, names: Sequence[str]) -> Tensor:
        """What the adapters together add to the singular values, (min(m, n),), float32."""
        shift = torch.stack([self.scaling[name] * self.svdiff_delta[name].float() for name in names]).sum(0)
        s = self.svdiff_s.float()
        return torch.relu(s + shift) - s

    def delta(self, names: Sequence[str]) -> Tensor:
        base = self.get_base_layer()
        if self.on_vector:
            each = [name for name in names if len(self.svdiff_delta[name]) == len(base.weight) > 1]
            parts = [self.scaling[name] * self.svdiff_delta[name].float() for name in each]
            whole = [name for name in names if name not in each]
            return torch.stack([*parts, *([self._product(whole)[0]] if whole else [])]).sum(0)
        total = self._product(names)
        return total.reshape(base.weight.shape) if isinstance(base, CONVOLUTIONS) else total

    def _product(self, names: Sequence[str]) -> Tensor:
        assert self.svdiff_u is not None
        return (self.svdiff_u.float() * self.change(names)) @ self.svdiff_v.float().mT

    def effect(self, x: Tensor, names: Sequence[str]) -> Tensor:
        base, change = self.get_base_layer(), self.change(names)
        if isinstance(base, CONVOLUTIONS):
            kernel = self.delta(names)
            result: Tensor = base._conv_forward(self._cast_input_dtype(x, kernel.dtype), kernel, None)
            return result
        assert self.svdiff_u is not None
        u, v = self.svdiff_u.float(), self.svdiff_v.float()
        if isinstance(base, nn.Embedding):
            scale = self._get_embed_scale()
            rows = (functional.embedding(x, u) * change) @ v.mT
            return rows if scale is None else rows * scale
        x = self._cast_input_dtype(x, change.dtype)
        return ((x @ u) * change) @ v.mT if is_conv1d(base) else ((x @ v) * change) @ u.mT

    def adapted(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        if not self.on_vector:
            return super().adapted(x, names, *args, **kwargs)
        base = self.get_base_layer()
        changed = (base.weight.float() + self.delta(names)).to(base.weight.dtype)
        result: Tensor = torch.func.functional_call(base, {"weight": changed}, (x, *args), kwargs)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts matrices of linear layers only."""
        base = self.get_base_layer()
        return not self.on_vector and not isinstance(base, (*CONVOLUTIONS, nn.Embedding))


def shift_count(shape: Sequence[int], norm_shift: str) -> int:
    """How many numbers shift the singular values of a weight of this shape; ``norm_shift`` as `SvdiffConfig` has it."""
    if len(shape) == 1:
        return shape[0] if norm_shift == "element" else 1
    return min(shape[0], prod(shape[1:]))
