"""Layers of LoRA-X."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from regraft.singular import as_matrix, marks_of, print_of, rank_for, signs_by
from regraft.tuners._layer import CONVOLUTIONS, Buffers, check_matrix_layer, is_conv1d
from regraft.tuners._prints import PrintedLayer
from regraft.tuners._vectors import vectors_of
from regraft.tuners.lorax.config import LoraXConfig

# What all of the paper's experiments have.
_USUAL = 320


class LoraXLayer(PrintedLayer):
    """ΔW = U ΔΣ Vᵀ on the weight as it is stored, (m, n): (out, in), (in, out) of a Conv1D, (out, in · kh · kw).

    Attributes:
        lorax_sigma: ΔΣ, the trained numbers: (r,) or (r, r).
        lorax_u: (m, r), from the base, float32.
        lorax_v: (n, r), likewise.
        lorax_print: a few numbers that tell the base, (16,): see `regraft.singular.print_of`.
        lorax_marks: of a full ΔΣ, numbers that tell the directions' signs, (r, 4): see `regraft.singular.marks_of`.
    """

    title = "LoRA-X"
    print_name = "lorax_print"
    noted_names = ("own_prints",)
    adapter_layer_names: tuple[str, ...] = ("lorax_sigma",)
    buffer_names = ("lorax_u", "lorax_v", "lorax_print", "lorax_marks")
    lorax_sigma: nn.ParameterDict
    lorax_u: Buffers
    lorax_v: Buffers
    lorax_print: Buffers
    lorax_marks: Buffers

    @classmethod
    def check(cls, base_layer: nn.Module, config: LoraXConfig, key: str) -> None:
        check_matrix_layer(base_layer, key, cls.title, in_groups="its weight is no single matrix")

    def add(self, adapter_name: str, config: LoraXConfig) -> None:
        weight = self.float_weight()
        rank = self._rank(weight, config)
        u, v = self._shared(weight, rank) or self._computed(weight, rank, config)
        shape = (rank, rank) if config.full else (rank,)
        start = torch.zeros(shape) if config.init_weights else 0.02 * torch.randn(shape)
        self.lorax_sigma[adapter_name] = nn.Parameter(start)
        self.lorax_u.put(adapter_name, u, stored=config.store_bases)
        self.lorax_v.put(adapter_name, v, stored=config.store_bases)
        # With U and V in the file the base's own ones don't matter.
        port = config.base_changed == "port" or config.store_bases
        self.put_print(adapter_name, print_of(weight, u, v), port=port)
        if config.full and not config.store_bases:
            self.lorax_marks.put(adapter_name, marks_of(u), stored=True)

    def settle(self, adapter_name: str) -> None:
        """Turn the signs of U and V to those that the adapter was trained with."""
        if adapter_name in self.lorax_marks:
            u, v = self.lorax_u[adapter_name], self.lorax_v[adapter_name]
            signs = signs_by(self.lorax_marks[adapter_name], u)
            # Not in place: other adapters may share them.
            self.lorax_u[adapter_name], self.lorax_v[adapter_name] = u * signs, v * signs

    def _rank(self, weight: Tensor, config: LoraXConfig) -> int:
        most = min(as_matrix(weight).shape)
        pattern = get_pattern_key(config.rank_pattern, self.key)
        if pattern in config.rank_pattern:
            rank = config.rank_pattern[pattern]
        elif config.energy is not None:
            with self.naming():
                rank = rank_for(weight, config.energy)
            # What the file was trained with is what it must be loaded with.
            config.rank_pattern[f"^{self.key}"] = rank
        else:
            rank = min(_USUAL, most) if config.r is None else config.r
        if rank > most:
            raise ValueError(
                f"{self.key}: r = {rank} is above {most}, the number of its singular values: give a lower r, or energy"
            )
        return rank

    def _shared(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
        """U and V of another adapter on the layer, where they serve."""
        for name, u in self.lorax_u.items():
            v = self.lorax_v[name]
            same = u.shape[1] >= rank and u.device.type != "meta"
            if same and torch.equal(print_of(weight, u, v), self.own_prints[name][0]):
                return u[:, :rank], v[:, :rank]
        return None

    def _computed(self, weight: Tensor, rank: int, config: LoraXConfig) -> tuple[Tensor, Tensor]:
        with self.naming():
            u, _, v = vectors_of(weight, rank, config.svd_cache)
        return u.float().to(weight.device), v.float().to(weight.device)

    @torch.no_grad()
    def align(self, names: Sequence[str]) -> None:
        """Give several adapters the first one's signs of U and V.

        Raises:
            ValueError: they are on other directions.
        """
        self.confirm(names)
        for name in names[1:]:
            along = (self.lorax_u[names[0]].float() * self.lorax_u[name].float()).sum(0)
            if not bool((along.abs() > 0.99).all()):
                raise ValueError(f"{self.key}: {names[0]} and {name} are on other directions, and don't add up")
            signs, sigma = along.sign(), self.lorax_sigma[name]
            if sigma.dim() == 2:
                sigma.copy_(signs[:, None] * sigma * signs)
            self.lorax_u[name], self.lorax_v[name] = self.lorax_u[name] * signs, self.lorax_v[name] * signs
            if name in self.lorax_marks:
                self.lorax_marks[name] = marks_of(self.lorax_u[name]).to(signs.device)

    def delta(self, names: Sequence[str]) -> Tensor:
        base = self.get_base_layer()
        total = torch.stack([self.scaling[name] * self.matrix(name) for name in names]).sum(0)
        return total.reshape(base.weight.shape) if isinstance(base, CONVOLUTIONS) else total

    def matrix(self, name: str) -> Tensor:
        """ΔW of an adapter at strength 1 as a matrix (m, n), float32."""
        left = _times(self.lorax_u[name].float(), self.lorax_sigma[name].float())
        result: Tensor = left @ self.lorax_v[name].float().mT
        return result

    def effect(self, x: Tensor, names: Sequence[str]) -> Tensor:
        return (
            torch.stack([self._effect(x, name) for name in names]).sum(0) if len(names) > 1 else self._effect(x, *names)
        )

    def _effect(self, x: Tensor, name: str) -> Tensor:
        """((x V) ΔΣᵀ) Uᵀ; ((x U) ΔΣ) Vᵀ on a Conv1D."""
        base, sigma = self.get_base_layer(), self.lorax_sigma[name]
        u, v = self.lorax_u[name].to(sigma.dtype), self.lorax_v[name].to(sigma.dtype)
        x = self._cast_input_dtype(x, sigma.dtype)
        if is_conv1d(base):
            result: Tensor = _times(x @ u, sigma) @ v.mT
        elif isinstance(base, CONVOLUTIONS):
            down = v.mT.reshape(v.shape[1], *base.weight.shape[1:])
            seen = base._conv_forward(x, down, None).movedim(-len(base.kernel_size) - 1, -1)
            result = (_times(seen, sigma.mT if sigma.dim() == 2 else sigma) @ u.mT).movedim(
                -1, -len(base.kernel_size) - 1
            )
        else:
            result = _times(x @ v, sigma.mT if sigma.dim() == 2 else sigma) @ u.mT
        return self.scaling[name] * result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts matrices only."""
        return not isinstance(self.get_base_layer(), CONVOLUTIONS)


def _times(rows: Tensor, sigma: Tensor) -> Tensor:
    """rows · ΔΣ, of a diagonal (r,) or a matrix (r, r)."""
    return rows * sigma if sigma.dim() == 1 else rows @ sigma
