"""Anchor ridge: what adapters that exist on both bases say of one that exists on the old base alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import InputError, UsageError
from regraft.formats import load_adapter
from regraft.methods import Carried, method
from regraft.methods._moments import cut_in
from regraft.methods.task import AdapterTask
from regraft.plan import locate
from regraft.tensors import InMemory
from regraft.updates import LowRank, Update


@dataclass(frozen=True)
class Anchor:
    """One adapter on both bases: base's own module → its update."""

    old: Mapping[ModuleRef, Update]
    new: Mapping[ModuleRef, Update]


@method(
    "anchor-ridge",
    reference="ridge in the span of paired adapters (CoLoRAI workshop 2026), from its summary",
    summary="Writes the update as a mix of adapters that exist on both bases, and mixes their new versions alike.",
    needs=("old", "new", "adapters"),
    scope="adapter",
    per="adapter",
    resizes=True,
)
def anchor_ridge(
    task: AdapterTask,
    *,
    anchors: str | None = None,
    ridge: float = 0.01,
    mix: Literal["adapter", "module"] = "adapter",
) -> Carried:
    """ΔW_new = Σ c_i A_i,new, with c = argmin ‖ΔW − Σ c_i A_i,old‖² + λ ‖c‖² (A scaled to mean norm 1, λ = ridge).

    The paper's details could not be found; chosen: one mix for the whole adapter, which a few anchors can bear, over
    the modules that adapter and anchors share. No module of one base has to answer to one of the other. What lies
    outside of the anchors' span is lost; the figure ``in_span`` says how much is inside.

    Args:
        task: the adapter and both bases.
        anchors: ``OLD1=NEW1,OLD2=NEW2,…``, or a folder with ``old/NAME`` and ``new/NAME``.
        ridge: λ.
        mix: one for the whole ``adapter``, or one for each ``module``.
    """
    known = [_opened(task, *paths) for paths in anchor_paths(anchors)]
    shared = [module for module in task.modules if any(module in anchor.old for anchor in known)]
    if not shared:
        what = "no anchor changes a module that the adapter changes"
        raise InputError(what, file=task.adapter.path, remedy="Give anchors of the same target modules.")
    problems: dict[ModuleRef, tuple[Tensor, Tensor, float]] = {}
    for done, module in enumerate(shared):
        task.tick(done, len(shared), str(module))
        weight = task.old.weight(module).float()
        deltas = [_delta(anchor.old.get(module), weight) for anchor in known]
        problems[module] = span_problem(task.delta(module), deltas)
    whole = _summed(problems.values())
    mixes = {module: solve_mix(*(whole if mix == "adapter" else problems[module])[:2], ridge) for module in shared}
    updates: dict[ModuleRef, Update] = {}
    lost: dict[ModuleRef, float] = {}
    one = next(iter(mixes.values()))
    for target in dict.fromkeys(ref for anchor in known for ref in anchor.new):
        source = next((module for module in shared if task.target(module) == target), None)
        coefficients = mixes.get(source, one) if source is not None else one
        weight = task.new.weight(target).float()
        parts = [c * _delta(anchor.new.get(target), weight) for c, anchor in zip(coefficients, known, strict=True)]
        updates[target], lost[target] = _as_wanted(task, target, known, sum(parts, torch.zeros(())))
    inside = 1 - _left(whole, one) / max(whole[2], 1e-30) if mix == "adapter" else float("nan")
    figures = {"anchors": float(len(known)), **({"in_span": inside} if mix == "adapter" else {})}
    left = {module: "no anchor changes it" for module in task.modules if module not in shared}
    said = ", ".join(f"{c:.2f}" for c in one.tolist())
    reason = f"a mix of {len(known)} adapters that exist on both bases ({said})" if mix == "adapter" else ""
    return Carried(updates, "anchor-ridge", reason, left, figures, lost)


def anchor_paths(anchors: str | None) -> list[tuple[Path, Path]]:
    """The pairs of adapters, old and new.

    Raises:
        UsageError: there are none, or they can't be told apart.
        InputError: an adapter of the folder has no partner.
    """
    remedy = "Give --anchors OLD1=NEW1,OLD2=NEW2, or a folder with old/NAME and new/NAME."
    if not anchors:
        raise UsageError("anchor-ridge learns from adapters that exist on both bases", remedy=remedy)
    folder = Path(anchors).expanduser()
    if folder.is_dir():
        olds = sorted(path for path in (folder / "old").glob("*") if not path.name.startswith("."))
        for old in olds:
            if not (folder / "new" / old.name).exists():
                raise InputError("has no partner in new/", file=old, remedy=remedy)
        if not olds:
            raise InputError("holds no anchors", file=folder, remedy=remedy)
        return [(old, folder / "new" / old.name) for old in olds]
    pairs = [part.split("=") for part in anchors.split(",") if part]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UsageError(f"--anchors {anchors!r} can't be read", remedy=remedy)
    return [(Path(old).expanduser(), Path(new).expanduser()) for old, new in pairs]


def span_problem(delta: Tensor, anchors: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Gram matrix (n, n) of the anchors, their products with ``delta`` (n,), and ‖delta‖²; float64."""
    flat = torch.stack([anchor.double().flatten() for anchor in anchors])
    wanted = delta.double().flatten()
    return flat @ flat.T, flat @ wanted, float(wanted.square().sum())


def solve_mix(gram: Tensor, product: Tensor, ridge: float) -> Tensor:
    """argmin ‖ΔW − Σ c_i A_i‖² + λ Σ c_i² ‖A‖²_mean, (n,)."""
    size = gram.diagonal().mean().clamp_min(1e-30)
    solved: Tensor = torch.linalg.solve(gram + ridge * size * torch.eye(len(gram), dtype=gram.dtype), product)
    return solved


def _summed(problems: Iterable[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    grams, products, squares = zip(*problems, strict=True)
    return torch.stack(grams).sum(0), torch.stack(products).sum(0), sum(squares)


def _left(problem: tuple[Tensor, Tensor, float], mix: Tensor) -> float:
    gram, product, square = problem
    return float(mix @ gram @ mix - 2 * mix @ product) + square


def _opened(task: AdapterTask, old: Path, new: Path) -> Anchor:
    return Anchor(_located(old, task.old, "old"), _located(new, task.new, "new"))


def _located(path: Path, base: Base, which: str) -> dict[ModuleRef, Update]:
    names = {component: tuple(base.modules(component)) for component in base.components}
    adapter: Adapter = load_adapter(path, names=names)
    return {home: adapter.updates[ref] for ref, home in locate(adapter, base, which).modules.items()}


def _delta(update: Update | None, weight: Tensor) -> Tensor:
    """ΔW as a matrix, (out, in · kh · kw); zeros where there is none."""
    if update is None:
        return torch.zeros_like(weight).flatten(1)
    return (update.merged(weight).reshape(weight.shape) - weight).flatten(1)


def _as_wanted(task: AdapterTask, target: ModuleRef, known: Sequence[Anchor], delta: Tensor) -> tuple[Update, float]:
    """ΔW (out, in) as a LoRA of the wanted rank; by default of the anchors' largest."""
    own = max((u.rank for anchor in known if (u := anchor.new.get(target)) and u.rank), default=min(delta.shape))
    rank = min(delta.shape) if task.rank == "full" else own if task.rank is None else task.rank
    up, down, lost = cut_in(delta, rank)
    return LowRank(InMemory(up), InMemory(down), 1.0).with_factors(up, down, task.new.shape(target)), lost
