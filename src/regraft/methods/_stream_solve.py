"""What `stream` has in common for texts and pictures: a write to the residual stream, solved in closed form."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from regraft.adapter import ModuleRef
from regraft.methods._moments import cut_in
from regraft.methods.task import AdapterTask
from regraft.runtime.record import is_conv1d, matrix_of, shaped_as
from regraft.tensors import InMemory, Shape
from regraft.updates import Diff, LowRank, Update
from regraft.updates.exact import refactor


@dataclass
class Sums:
    """Second moments of a write's inputs x (N, in) and of the changes r (N, out) wanted of its outputs.

    Attributes:
        gram: Σ x xᵀ, with a last row and column for the constant 1; float64 like all.
        cross: Σ r xᵀ, (out, in + 1).
    """

    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, module: nn.Module) -> Sums:
        return cls.sized(*matrix_of(module).shape)

    @classmethod
    def sized(cls, out: int, inp: int) -> Sums:
        return cls(torch.zeros(inp + 1, inp + 1, dtype=torch.float64), torch.zeros(out, inp + 1, dtype=torch.float64))

    def add(self, x: Tensor, r: Tensor) -> None:
        x = nn.functional.pad(x, (0, 1), value=1.0)
        self.gram += (x.T @ x).double()
        self.cross += (r.T @ x).double()

    def solve(self, ridge: float, *, bias: bool) -> tuple[Tensor, Tensor]:
        """argmin ‖Δ x + b − r‖² + λ ‖Δ‖², with λ = ``ridge`` × the mean diagonal of the (centred) Σ x xᵀ.

        Returns:
            Δ (out, in) and b (out,), which is zero without ``bias`` and bears no penalty with it.
        """
        gram, cross = self.gram[:-1, :-1], self.cross[:, :-1]
        rows, sums, wanted = self.gram[-1, -1].clamp_min(1), self.gram[-1, :-1], self.cross[:, -1]
        if bias:
            gram = gram - torch.outer(sums, sums) / rows
            cross = cross - torch.outer(wanted, sums) / rows
        delta = torch.linalg.solve(penalised(gram, ridge), cross, left=False)
        shift = (wanted - delta @ sums) / rows if bias else torch.zeros_like(wanted)
        return delta.float(), shift.float()

    def metric(self, ridge: float, *, bias: bool) -> Tensor:
        """What a cut to a rank is measured in: that of `solve`."""
        gram, sums = self.gram[:-1, :-1], self.gram[-1, :-1]
        centred = gram - torch.outer(sums, sums) / self.gram[-1, -1].clamp_min(1) if bias else gram
        return penalised(centred, ridge)


def penalised(gram: Tensor, ridge: float) -> Tensor:
    """Σ x xᵀ + λ I."""
    added = ridge * gram.diagonal().mean().clamp_min(1e-12)
    return gram + added * torch.eye(len(gram), dtype=gram.dtype)


@dataclass
class Write:
    """One module that is solved for, and what has been found for it so far.

    Attributes:
        ref: by the new base's name.
        module: of the model that is being ported to; its weight holds what has been found.
        base: its weight (out, in · kh · kw) before, and its bias.
        rank: of the result; None is dense.
        delta: ΔW, (out, in · kh · kw).
        shift: change of the bias, (out,); None where there is none.
        factors: of ΔW, where it has a rank.
        lost: share of ‖ΔW‖² that the cut lost.
    """

    ref: ModuleRef
    module: nn.Module
    rank: int | None
    base: Tensor = field(init=False)
    bias: Tensor | None = field(init=False)
    delta: Tensor = field(init=False)
    shift: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    lost: float = 0.0

    def __post_init__(self) -> None:
        self.base = matrix_of(self.module).float().clone()
        bias = getattr(self.module, "bias", None)
        self.bias = bias.detach().clone() if isinstance(bias, Tensor) else None
        self.delta = torch.zeros_like(self.base)

    def put(self, delta: Tensor, shift: Tensor | None = None) -> None:
        """Set ΔW and the bias' change; what reads the module next reads what it gives now."""
        self.delta, self.shift = delta, shift
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        changed = shaped_as(self.module, (self.base + delta).to(weight)).contiguous()
        self.module._parameters["weight"] = nn.Parameter(changed, requires_grad=False)
        if shift is not None:
            old = torch.zeros_like(shift) if self.bias is None else self.bias.float().cpu()
            self.module._parameters["bias"] = nn.Parameter((old + shift).to(weight), requires_grad=False)

    def cut(self, metric: Tensor) -> None:
        """Down to the wanted rank, in the metric of the inputs."""
        if self.rank is None:
            return
        up, down, self.lost = cut_in(self.delta, self.rank, metric)
        self.factors = (up, down)
        self.put(up @ down, self.shift)

    def updates(self, task: AdapterTask) -> dict[ModuleRef, Update]:
        """As the adapter's own format can say it: low-rank, or dense as `AdapterTask.dense` has it; biases likewise."""
        shape = task.new.shape(self.ref)
        bias = None if self.shift is None or not bool(self.shift.any()) else InMemory(self.shift)
        component, path = self.ref
        made: dict[ModuleRef, Update] = {}
        if task.holds_diff and bias is not None:
            made[ModuleRef(component, f"{path}.bias")] = Diff(bias, f"{path}.diff_b")
            bias = None
        if task.holds_diff and self.factors is None:
            value = shaped_as(self.module, self.delta).reshape(shape).contiguous()
            made[ModuleRef(component, f"{path}.weight")] = Diff(InMemory(value), f"{path}.diff")
            return made
        return made | {self.ref: replace(self._low_rank(shape), bias=bias)}

    def _low_rank(self, shape: Shape) -> LowRank:
        up, down = self.factors if self.factors is not None else refactor(self.delta).update.factors()
        if is_conv1d(self.module):
            up, down = down.T.contiguous(), up.T.contiguous()
        return LowRank(InMemory(up), InMemory(down), 1.0).with_factors(up, down, shape)


def rank_of(task: AdapterTask) -> int | None:
    """The rank of each write: the wanted one, or the adapter's largest; None is dense.

    The writes are modules of their own, so that the adapter's ranks can't answer to them one by one.
    """
    if task.rank == "full":
        return None
    if isinstance(task.rank, int):
        return task.rank
    own = [update.rank for update in task.modules.values() if update.rank is not None]
    return max(own, default=None)
