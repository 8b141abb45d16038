"""What the student is taught: the new base's own outputs, with the change that the adapter made on the old base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.adapter import Adapter
from regraft.errors import InputError
from regraft.probes.batches import Batch
from regraft.refine.states import HiddenAim
from regraft.refine.teacher import Teacher
from regraft.runtime.both import BothModels, Side
from regraft.runtime.load import Loaded

#: Numbers of an aim that are kept whole; of larger vocabularies the likeliest tokens, and the rest as one.
MOST_NUMBERS = 1 << 26
LIKELIEST = 128
# An adapter that moves the outputs of no batch further than this does nothing that could be taught.
NO_EFFECT = 1e-7


@dataclass(frozen=True)
class Aim:
    """What is wanted on one batch.

    Attributes:
        batch: the inputs.
        wanted: (rows, k): log-probabilities of k tokens, or of k − 1 and all others together; or any other outputs.
        tokens: (rows, k − 1), which tokens those are; None for all, in order.
        language: whether outputs are log-probabilities.
        size: mean distance of the new base alone from what is wanted; on its own inputs, from the adapter's effect.
        retention: the new base made the inputs: it is to stay itself there.
        hidden: what is wanted of hidden states beside; see `regraft.refine.hidden`.
    """

    batch: Batch
    wanted: Tensor
    tokens: Tensor | None
    language: bool
    size: float
    retention: bool
    hidden: HiddenAim | None = field(default=None, kw_only=True)

    def distance(self, outputs: Tensor) -> Tensor:
        """Mean over rows of KL(wanted ‖ outputs), or of the squared error.

        Args:
            outputs: the model's, as `told` gives them.
        """
        return distance(self.wanted.to(outputs.device), outputs, self.language)

    def loss(self, outputs: Tensor) -> Tensor:
        """What a step makes less: the distance, and whatever helps on the way."""
        return self.distance(outputs)

    def told(self, outputs: Tensor) -> Tensor:
        """A model's outputs on the batch, in the form of ``wanted``."""
        return _told(outputs, self.tokens, self.language, self.batch.rows("new"))


def aims_of(
    models: BothModels,
    adapter: Adapter,
    batches: Sequence[Batch],
    pull: float,
    *,
    stay: float = 0.0,
    tick: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Aim]:
    """Aims for every batch: y_t + (y_a − y_s) + μ (y_s − y_t), in logits or in whatever the models give.

    y_s, y_a are the old base's outputs without and with the adapter, y_t the new base's. μ = 1 is *output matching*
    (the student is to be the old base with its adapter), μ = 0 *effect matching* (the new base keeps its own
    qualities). On inputs that the new base made itself, what is wanted is y_t + (1 − ς) (y_a − y_s): no pull, and with
    ς = 1 the new base as it is.

    Args:
        models: both bases.
        adapter: for the old one.
        batches: inputs.
        pull: μ.
        stay: ς.
        tick: called with (done, in all, what).

    Raises:
        InputError: the adapter has no effect on the old base, or outputs can't be compared.
    """
    return aims_by(models, Teacher.of(models, adapter), batches, pull, stay=stay, tick=tick)


@torch.no_grad()
def aims_by(
    models: BothModels,
    teacher: Teacher,
    batches: Sequence[Batch],
    pull: float,
    *,
    stay: float = 0.0,
    tick: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Aim]:
    """See `aims_of`; the teacher may have an adapter of any kind."""
    language, n = models.old.kind == "language", len(batches)
    with models.turn("old"):
        with_it = []
        with teacher.at_work():
            for i, batch in enumerate(batches):
                tick(i, 3 * n, "the old base with its adapter")
                with_it.append(outputs_of(batch, models.old, "old", None, language))
        without = []
        for i, (batch, (_, tokens)) in enumerate(zip(batches, with_it, strict=True)):
            tick(n + i, 3 * n, "the old base without it")
            without.append(outputs_of(batch, models.old, "old", tokens, language)[0])
    aims, moved = [], 0.0
    for i, (batch, (y_a, tokens), y_s) in enumerate(zip(batches, with_it, without, strict=True)):
        tick(2 * n + i, 3 * n, "the new base")
        with models.turn("new"):
            y_t, _ = outputs_of(batch, models.new, "new", tokens, language)
        if y_s.shape != y_t.shape:
            raise InputError(
                f"gives outputs of another shape ({tuple(y_t.shape)}) than the old base ({tuple(y_s.shape)})",
                file=models.new.path,
            )
        kept = batch.made_by == "new"
        effect = _normal(y_t + (y_a - y_s), language)
        change = (1 - stay) * (y_a - y_s) if kept else (y_a - y_s) + pull * (y_s - y_t)
        wanted = _normal(y_t + change, language)
        moved = max(moved, float(distance(effect, y_t, language)))
        size = float(distance(effect if kept else wanted, y_t, language))
        aims.append(Aim(batch, wanted, tokens, language, size, kept))
    if moved <= NO_EFFECT:
        raise no_effect(teacher.path)
    return aims


def no_effect(path: Path | None) -> InputError:
    """The error for an adapter that does nothing to the old base."""
    return InputError(
        "has no effect on the old base: there is nothing to bring over",
        file=path,
        remedy="Is it the base that it was trained on? `regraft identify` looks for the right one.",
    )


def outputs_of(
    batch: Batch, model: Loaded, side: Side, tokens: Tensor | None, language: bool
) -> tuple[Tensor, Tensor | None]:
    """Outputs (rows, k) on the CPU; and the tokens that were chosen, where the caller has chosen none."""
    out = batch.run(model, side).float()
    if language and tokens is None and out.numel() > MOST_NUMBERS // 8 and out.shape[-1] > 2 * LIKELIEST:
        flat = out.flatten(0, -2)
        rows = batch.rows(side)
        tokens = (flat if rows is None else flat[rows]).topk(LIKELIEST, -1).indices
    return _told(out, tokens, language, batch.rows(side)).cpu(), None if tokens is None else tokens.cpu()


def _told(out: Tensor, tokens: Tensor | None, language: bool, rows: Tensor | None) -> Tensor:
    if not language:
        return out.float()
    flat = out.float().flatten(0, -2)
    flat = flat if rows is None else flat[rows.to(flat.device)]
    told = F.log_softmax(flat, -1)
    if tokens is None:
        return told
    chosen = told.gather(-1, tokens.to(told.device))
    rest = torch.log1p(-chosen.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([chosen, rest], -1)


def _normal(logits: Tensor, language: bool) -> Tensor:
    return F.log_softmax(logits, -1) if language else logits


def distance(wanted: Tensor, got: Tensor, language: bool) -> Tensor:
    """Mean over rows of KL(wanted ‖ got) of log-probabilities (rows, k); of other outputs, the mean squared error."""
    if language:
        return F.kl_div(got, wanted, reduction="batchmean", log_target=True)
    return F.mse_loss(got, wanted)
