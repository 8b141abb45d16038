"""What modules read and write while a model runs: as matrices, batch by batch, or summed up to second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.adapter import ModuleRef
from regraft.runtime.both import BothModels, Side, modules_of
from regraft.runtime.load import Loaded

# Second moments of so many values are kept at a time; the models run again for the rest.
_MOST_VALUES = 128_000_000


class RunsBatch(Protocol):
    """As `regraft.probes.batches.Batch`."""

    def run(self, model: Loaded, side: Side) -> Tensor: ...

    def rows(self, side: Side) -> Tensor | None: ...


@dataclass(frozen=True)
class Activation:
    """One module on one batch.

    Attributes:
        input: (N, in), for a convolution (N, in · kh · kw): what its weight is multiplied with.
        output: (N, out), bias included.
    """

    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class Statistics:
    """Second moments of one module's inputs x and outputs y (bias included), over corresponding rows of both models.

    Attributes:
        rows: N.
        in_old: Σ x_s x_sᵀ, (in, in); float32 like all.
        in_new: Σ x_t x_tᵀ, (in', in').
        in_cross: Σ x_s x_tᵀ, (in, in').
        out_cross: Σ y_s y_tᵀ, (out, out').
        transposed: the base keeps the weight as (in, out) (GPT-2).
    """

    rows: int
    in_old: Tensor
    in_new: Tensor
    in_cross: Tensor
    out_cross: Tensor
    transposed: bool = False


def is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies its input with a matrix: linear layers, and convolutions without groups."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D (GPT-2), a linear layer with its weight transposed."""
    return type(module).__name__ == "Conv1D"


def matrix_of(module: nn.Module) -> Tensor:
    """The weight as (out, in · kh · kw)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return weight.T if is_conv1d(module) else weight.flatten(1)


def shaped_as(module: nn.Module, matrix: Tensor) -> Tensor:
    """The inverse of `matrix_of`."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (matrix.T if is_conv1d(module) else matrix).reshape(weight.shape)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """A module's input as rows (N, in · kh · kw), float32."""
    if isinstance(module, nn.Conv2d):
        columns = F.unfold(x.float(), module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        return columns.transpose(1, 2).flatten(0, 1)
    return x.float().reshape(-1, x.shape[-1])


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """A module's output as rows (N, out), float32."""
    return y.float().flatten(2).transpose(1, 2).flatten(0, 1) if y.dim() == 4 else y.float().reshape(-1, y.shape[-1])


def as_output(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `output_rows`: rows (N, out) in the shape of a module's output, and in its dtype."""
    if like.dim() == 4:
        n, out = like.shape[:2]
        return rows.reshape(n, -1, out).transpose(1, 2).reshape(like.shape).to(like.dtype)
    return rows.reshape(like.shape).to(like.dtype)


def calls_of(model: Loaded, side: Side, refs: Sequence[ModuleRef], batch: RunsBatch) -> dict[ModuleRef, int]:
    """How often each module runs on one batch, in the order of execution; those that don't are left out."""
    counted: dict[ModuleRef, int] = {}

    def count(ref: ModuleRef) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            counted[ref] = counted.get(ref, 0) + 1

        return hook

    handles = [m.register_forward_pre_hook(count(ref)) for ref, m in modules_of(model, refs).items()]
    try:
        with torch.no_grad():
            batch.run(model, side)
    finally:
        for handle in handles:
            handle.remove()
    return counted


@torch.no_grad()
def record(
    model: Loaded, side: Side, refs: Sequence[ModuleRef], batches: Iterable[RunsBatch]
) -> Iterator[dict[ModuleRef, Activation]]:
    """Batch by batch, what each module read and wrote, at the rows that correspond in the other model.

    A module that runs more than once in a batch is given by its last run.

    Args:
        model: to run.
        side: which of the two bases it is.
        refs: the base's modules; those that are no matrices, or that the model lacks, are left out.
        batches: see `regraft.probes.batches`.
    """
    seen: dict[ModuleRef, Activation] = {}
    chosen: Tensor | None = None

    def keep(ref: ModuleRef) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = input_rows(module, args[0]), output_rows(module, output)
            # A text encoder of a pipeline has other rows than the denoiser, and none that could differ.
            fits = chosen is not None and bool(len(chosen)) and int(chosen.max()) < len(x)
            seen[ref] = Activation(x[chosen], y[chosen]) if fits else Activation(x, y)

        return hook

    found = {ref: module for ref, module in modules_of(model, refs).items() if is_matrix(module)}
    handles = [module.register_forward_hook(keep(ref)) for ref, module in found.items()]
    try:
        for batch in batches:
            chosen = batch.rows(side)
            batch.run(model, side)
            yield dict(seen)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()


def statistics(
    models: BothModels, pairs: Mapping[ModuleRef, ModuleRef], batches: Sequence[RunsBatch]
) -> Iterator[tuple[ModuleRef, Statistics]]:
    """Second moments of paired modules over all batches; both models run once for as many as memory should hold.

    Args:
        models: both.
        pairs: old module → new module.
        batches: the same inputs for both.
    """
    for group in _groups(models, pairs):
        sums: dict[ModuleRef, Statistics] = {}
        new = {pairs[ref]: ref for ref in group}
        ours = record(models.old, "old", group, batches)
        theirs = record(models.new, "new", list(new), batches)
        for before, after in zip(ours, theirs, strict=True):
            for target, ref in new.items():
                if ref in before and target in after and len(before[ref].input) == len(after[target].input):
                    part = _moments(before[ref], after[target])
                    sums[ref] = _added(sums[ref], part) if ref in sums else part
        kinds = modules_of(models.old, sums)
        for ref, found in sums.items():
            yield ref, replace(found, transposed=is_conv1d(kinds[ref]))


def _groups(models: BothModels, pairs: Mapping[ModuleRef, ModuleRef]) -> Iterator[list[ModuleRef]]:
    group: list[ModuleRef] = []
    size = 0
    found = modules_of(models.old, pairs)
    for ref in pairs:
        if ref not in found or not is_matrix(found[ref]):
            continue
        out, inp = matrix_of(found[ref]).shape
        if group and size + 3 * inp * inp + out * out > _MOST_VALUES:
            yield group
            group, size = [], 0
        group.append(ref)
        size += 3 * inp * inp + out * out
    if group:
        yield group


def _moments(old: Activation, new: Activation) -> Statistics:
    return Statistics(
        len(old.input),
        old.input.T @ old.input,
        new.input.T @ new.input,
        old.input.T @ new.input,
        old.output.T @ new.output,
    )


def _added(a: Statistics, b: Statistics) -> Statistics:
    return Statistics(
        a.rows + b.rows,
        a.in_old + b.in_old,
        a.in_new + b.in_new,
        a.in_cross + b.in_cross,
        a.out_cross + b.out_cross,
    )
