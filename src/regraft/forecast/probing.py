"""The forecast's third stage: both models run over inputs that the old one makes itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import mean

import torch
from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import UsageError
from regraft.forecast.survey import spread
from regraft.forecast.verdict import judge
from regraft.methods.task import Running
from regraft.prepare import Preparation
from regraft.probes.batches import Batch, make_batches
from regraft.probes.effects import compare
from regraft.runtime import applied, quiet_libraries
from regraft.runtime.both import BothModels, Side
from regraft.runtime.record import record

#: Self-made inputs, and modules of the fixed sample whose inputs are compared.
N_INPUTS, MODULES = 32, 8
# Rows of activations are enough by then.
_ROWS = 4096


def probed(adapter: Adapter, ready: Preparation, old: Base | None, new: Base | None, running: Running) -> Preparation:
    """The same preparation, judged once more with what both models do on self-made inputs.

    Raises:
        UsageError: one of the bases was not given.
        InputError, RegraftError: a base can't be run.
    """
    from regraft.carry import Settings
    from regraft.making import task_for

    if old is None or new is None:
        raise UsageError("--probe runs both bases", remedy="Give --from and --to.")
    if not ready.evidence.nearness:
        return ready
    task = replace(task_for(adapter, ready, Settings(), old, new, None), running=running)
    targets = {module: task.target(module) for module in task.modules}
    paired = {module: target for module, target in targets.items() if target is not None}
    figures = activation_figures(task.models, task.adapter, task.copied(), paired, running)
    evidence = replace(ready.evidence, probe=figures)
    return replace(ready, evidence=evidence, judgement=judge(adapter, ready.migration, evidence))


def activation_figures(
    models: BothModels,
    adapter: Adapter,
    copied: Adapter,
    paired: dict[ModuleRef, ModuleRef],
    running: Running,
) -> dict[str, float]:
    """What activations say of a copy; figures that are not defined for these two models are absent.

    ``inputs moved``: 1 − linear CKA of what the adapter's modules read in both bases, mean over a fixed sample.
    ``effect moved``: 1 − cosine of the adapter's effect on the old base's output with the copy's on the new one's.

    Args:
        models: both bases.
        adapter: for the old one.
        copied: the plain copy, by the new base's names.
        paired: the old base's modules that the adapter changes → the new base's.
        running: number of inputs, seed, prompts.
    """
    n = running.n_inputs or N_INPUTS
    with quiet_libraries():
        made = make_batches(models, adapter, n, running.seed, running.prompts, held_out=4)
        batches = made.fit
        sample = dict(spread(list(paired.items()), MODULES))
        found = {}
        alike = [cka for cka in _alignments(models, sample, batches) if cka is not None]
        if alike:
            found["inputs moved"] = 1 - mean(alike)
        cosines = _cosines(models, adapter, copied, batches)
    if cosines:
        found["effect moved"] = 1 - max(0.0, mean(cosines))
    return found


def _alignments(
    models: BothModels, sample: dict[ModuleRef, ModuleRef], batches: Sequence[Batch]
) -> Iterator[float | None]:
    read: dict[Side, dict[ModuleRef, list[Tensor]]] = {"old": {}, "new": {}}
    sides: tuple[tuple[Side, list[ModuleRef]], ...] = (("old", list(sample)), ("new", list(sample.values())))
    for side, refs in sides:
        for batch in record(models.side(side), side, refs, batches):
            for ref, activation in batch.items():
                read[side].setdefault(ref, []).append(activation.input[:_ROWS])
    for ref, target in sample.items():
        x, y = read["old"].get(ref), read["new"].get(target)
        if x is None or y is None or [len(part) for part in x] != [len(part) for part in y]:
            yield None
        else:
            yield linear_cka(torch.cat(x)[:_ROWS], torch.cat(y)[:_ROWS])


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Centred kernel alignment of two activations of the same inputs (Kornblith et al. 2019, arXiv 1905.00414, eq. 7).

    1 for equal ones, whatever rotation or scale lies between; None where one is constant.

    Args:
        x: (N, in).
        y: (N, in').
    """
    x, y = (part.double() - part.double().mean(0) for part in (x, y))
    within = float((x.T @ x).norm() * (y.T @ y).norm())
    return float((x.T @ y).square().sum()) / within if within > 0 else None


@torch.no_grad()
def _cosines(models: BothModels, adapter: Adapter, copied: Adapter, batches: Sequence[Batch]) -> list[float]:
    if any(batch.rows("old") is not None for batch in batches):
        # Other tokens: what one column of the logits stands for is another word in the other model.
        return []

    def outputs(side: Side, update: Adapter | None) -> list[Tensor]:
        model = models.side(side)
        with applied(model.components, update) if update is not None else nullcontext():
            return [batch.run(model, side).float() for batch in batches]

    before = list(zip(outputs("old", None), outputs("old", adapter), strict=True))
    after = list(zip(outputs("new", None), outputs("new", copied), strict=True))
    logits = models.old.kind == "language"
    found = []
    for (a, b), (c, d) in zip(before, after, strict=True):
        if a.shape != c.shape:
            return []
        pairs = zip(a, b, c, d, strict=True)
        figures = [compare((w, x), (y, z), comparable=True, logits=logits).cosine for w, x, y, z in pairs]
        found += [figure for figure in figures if figure is not None]
    return found
