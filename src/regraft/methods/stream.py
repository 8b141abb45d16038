"""Across architectures, without gradients through a network: by the residual stream and the outputs."""

from __future__ import annotations

from time import perf_counter

from regraft.adapter import ModuleRef
from regraft.errors import InputError
from regraft.methods import Carried, method
from regraft.methods._stream_pictures import PictureSettings, carry_pictures
from regraft.methods._stream_solve import Write
from regraft.methods._stream_text import TextSettings, carry_text
from regraft.methods.task import AdapterTask
from regraft.probes.batches import make_batches
from regraft.runtime.libraries import quiet_libraries
from regraft.updates import Update

N_TEXTS, N_STATES = 192, 384


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
    task: AdapterTask,
    *,
    pull: float = 1.0,
    keep: float = 0.0,
    ridge: float | None = None,
    sweeps: int = 2,
    head: bool = True,
    last: int = 2,
) -> Carried:
    """No module of the old base need answer to one of the new; both read the same inputs.

    Language models. Wanted at each position is log q = log p_new + (log p_old+adapter − log p_old) +
    μ (log p_old − log p_new). The ``last`` writes to the stream (attention output, MLP down; at the very end the
    output matrix) are solved one after the other, ``sweeps`` times, each against what is then still missing in the
    logits: with residual q − p, output matrix and norm as one matrix L, and the write's inputs x,
    ΔW = G⁻¹ (Σ s Lᵀ(q − p) xᵀ) (Σ x xᵀ + λ I)⁻¹, where G = Lᵀ E[diag(p) − p pᵀ] L and s is what the norm divides by.
    That is a Gauss-Newton step of KL(q ‖ p) by the straight way from the write to the logits; the last writes' problem
    is convex. Its length (2, 1, ½ or ¼) is the one with the lowest KL on held-out inputs, or none. Measured on tuning
    adapters, a base of other width and depth from scratch: 0.41 and 0.48 of the gap to the teacher dense, from two
    writes; all writes carry a little more (0.44 against 0.41), and lose several times as much retention.

    Denoisers. The old base draws pictures with and without the adapter from the same noise; both bases' autoencoders
    read them, and noise is added that is the same up to the turn between the latent spaces. Writes are the attention
    blocks' last projections, towards the old base's streams with the adapter, brought over by a ridge map that is
    fitted on the pictures without it; and last ``conv_out``, towards the predictions that stand for the picture that
    the old base with the adapter sees in the state. Biases are solved for, too.

    With a rank wanted, each solve is followed by its cut in the metric of the inputs, so that later writes make up for
    what it lost; by default every write has the adapter's highest rank.

    Args:
        task: the adapter and both bases.
        pull: μ on inputs that the old base with its adapter made: 1 wants what the teacher says there.
        keep: μ on inputs that either base made alone: 0 wants no more than the adapter's own change there (texts only).
        ridge: λ in units of the mean diagonal of Σ x xᵀ; by default 0.1 for texts, 0.01 for pictures.
        sweeps: over all writes (texts only).
        head: whether the output matrix is changed, too (never one that is tied to the embedding; texts only).
        last: how many of the last writes are solved for; 0 is all, which carries more and costs retention (texts only).

    Raises:
        InputError: the bases give hidden states alone, nothing is known of where the new base writes its stream, or
            they are no whole pipelines with an autoencoder.
    """
    started = perf_counter()
    if task.models.new.kind == "encoder":
        raise InputError(
            "gives hidden states alone; stream goes by logits or by a denoiser's predictions",
            file=task.new.path,
            remedy="Take another method, such as effect or ridge.",
        )
    with quiet_libraries():
        if task.models.new.kind == "denoiser":
            settings = PictureSettings(pull, 0.01 if ridge is None else ridge)
            writes, figures, made = carry_pictures(task, task.running.n_inputs or N_STATES, settings)
        else:
            batches = make_batches(task.models, task.adapter, task.running.n_inputs or N_TEXTS, task.seed, task.prompts)
            texts = TextSettings(pull, keep, 0.1 if ridge is None else ridge, sweeps, head, last)
            writes, figures = carry_text(task, batches, texts)
            made = batches.made
    return _carried(task, writes, {"pull": pull, **figures, "seconds": perf_counter() - started}, made)


def _carried(task: AdapterTask, writes: list[Write], figures: dict[str, float], made: str) -> Carried:
    changed = [write for write in writes if bool(write.delta.any())]
    updates: dict[ModuleRef, Update] = {}
    for write in changed:
        updates |= write.updates(task)
    homes = {write.ref for write in changed}
    why = "its effect goes through other modules of the new base" if changed else "no effect that could be carried"
    return Carried(
        updates,
        "stream",
        made,
        skipped={ref: why for ref in task.modules if task.target(ref) not in homes},
        figures={**figures, "writes": float(len(changed))},
        lost={write.ref: write.lost for write in changed if write.factors is not None},
        wholes=False,
    )


__all__ = ["stream"]
