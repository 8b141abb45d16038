"""Across architectures, without gradients through a network: by the residual stream and the outputs."""

from __future__ import annotations

from time import perf_counter

from regraft.adapter import ModuleRef
from regraft.errors import InputError
from regraft.methods import Carried, method
from regraft.methods._stream_text import TextSettings, carry_text
from regraft.methods.task import AdapterTask
from regraft.probes.batches import make_batches
from regraft.runtime.load import quiet_libraries
from regraft.updates import Update

N_TEXTS = 384


@method(
    "stream",
    reference="regraft's own; Gauss-Newton steps with a mean curvature (Martens and Grosse 2015), "
    "reduced-rank regression (Izenman 1975)",
    summary="For a new base of any architecture: the modules that write to its residual stream are solved in closed "
    "form until its outputs are what the adapter made of the old base's, on inputs that the bases make themselves.",
    needs=("old", "new", "models"),
    scope="adapter",
    per="adapter",
    resizes=True,
)
def stream(
    task: AdapterTask, *, pull: float = 1.0, keep: float = 0.0, ridge: float = 0.1, sweeps: int = 2, head: bool = True
) -> Carried:
    """No module of the old base need answer to one of the new; both read the same inputs.

    Language models. Wanted at each position is log q = log p_new + (log p_old+adapter − log p_old) +
    μ (log p_old − log p_new). The writes to the stream (attention output, MLP down; last the output matrix) are solved
    one after the other, ``sweeps`` times, each against what is then still missing in the logits: with residual q − p,
    output matrix and norm as one matrix L, and the write's inputs x,
    ΔW = G⁻¹ (Σ s Lᵀ(q − p) xᵀ) (Σ x xᵀ + λ I)⁻¹, where G = Lᵀ E[diag(p) − p pᵀ] L and s is what the norm divides by.
    That is a Gauss-Newton step of KL(q ‖ p) by the straight way from the write to the logits; the last writes' problem
    is convex. Its length (2, 1, ½ or ¼) is the one with the lowest KL on held-out inputs, or none. With a rank wanted,
    each step is followed by its cut in the metric of x, so that later writes make up for what it lost.

    Args:
        task: the adapter and both bases.
        pull: μ on inputs that the old base with its adapter made: 1 wants what the teacher says there.
        keep: μ on inputs that either base made alone: 0 wants no more than the adapter's own change there.
        ridge: λ in units of the mean diagonal of Σ x xᵀ.
        sweeps: over all writes.
        head: whether the output matrix is changed, too (never one that is tied to the embedding).

    Raises:
        InputError: the bases give hidden states alone, or nothing is known of where the new base writes its stream.
    """
    started = perf_counter()
    if task.models.new.kind == "encoder":
        raise InputError(
            "gives hidden states alone; stream goes by logits or by a denoiser's predictions",
            file=task.new.path,
            remedy="Take another method, such as effect or ridge.",
        )
    with quiet_libraries():
        batches = make_batches(task.models, task.adapter, task.running.n_inputs or N_TEXTS, task.seed, task.prompts)
        made = perf_counter()
        writes, figures = carry_text(task, batches, TextSettings(pull, keep, ridge, sweeps, head))
    updates: dict[ModuleRef, Update] = {write.ref: write.update(task) for write in writes if bool(write.delta.any())}
    why = "its effect goes through other modules of the new base" if updates else "no effect that could be carried"
    skipped = {ref: why for ref in task.modules if task.target(ref) not in updates}
    seconds = {"seconds_inputs": made - started, "seconds_solving": perf_counter() - made}
    return Carried(
        updates,
        "stream",
        batches.made,
        skipped=skipped,
        figures={"pull": pull, "writes": float(len(updates)), **figures, **seconds},
        lost={write.ref: write.lost for write in writes if write.ref in updates and write.factors is not None},
    )


__all__ = ["stream"]
