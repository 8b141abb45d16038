"""`stream` for language models: every write to the residual stream learns from what is missing in the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from regraft.adapter import ModuleRef
from regraft.errors import InputError
from regraft.methods._stream_solve import Sums, Write, penalised, rank_of
from regraft.methods.task import AdapterTask
from regraft.probes.batches import Batch, Batches
from regraft.runtime.applied import applied
from regraft.runtime.both import modules_of, twin
from regraft.runtime.load import Loaded
from regraft.runtime.record import calls_of, input_rows, is_matrix, output_rows
from regraft.spaces import named_sides

# Wanted log-probabilities of so many tokens in all are kept; beyond that the old base runs again for every write.
_MOST_VALUES = 200_000_000
_STEPS = (2.0, 1.0, 0.5, 0.25)
# Of the smaller vocabulary's tokens, so many must be in the larger for their probabilities to say what is wanted.
_SHARED = 0.5


@dataclass(frozen=True)
class TextSettings:
    """How the writes are solved.

    Attributes:
        pull: μ, on the inputs that the old base with its adapter made.
        keep: μ on all other inputs.
        ridge: λ of each solve, in mean squares of the write's inputs.
        sweeps: how often all writes are solved.
        head: whether the output matrix is one of the writes.
        last: so many of the last writes are solved for; 0 is all.
    """

    pull: float
    keep: float
    ridge: float
    sweeps: int
    head: bool
    last: int


@torch.no_grad()
def carry_text(task: AdapterTask, batches: Batches, settings: TextSettings) -> tuple[list[Write], dict[str, float]]:
    """Solve every write of the new base in turn, ``sweeps`` times; see `regraft.methods.stream`.

    Returns:
        The writes in the order of execution, and figures: mean KL from the wanted distribution on held-out inputs,
        in nats a token, of the new base alone and as ported.
    """
    ported = twin(task.models.new)
    writes = find_writes(task, ported, batches.fit[0], head=settings.head)[-settings.last :]
    readout = Readout.of(ported, batches.fit[0])
    with applied_twin(task) as with_adapter:
        wanted = Wanted(task, with_adapter, settings)
        if not any(wanted.changes(batch) for batch in batches.fit):
            return [], {}
        clock = perf_counter()
        for batch in batches.fit:
            batch.run(ported, "new")
        figures = {"seconds_one_pass": perf_counter() - clock}
        started = left = held_out(ported, batches.held_out, wanted)
        for sweep in range(settings.sweeps):
            for i, write in enumerate(writes):
                task.tick(sweep * len(writes) + i, settings.sweeps * len(writes), str(write.ref))
                left = _solve(write, ported, batches, readout, wanted, settings.ridge, left)
    return writes, {**figures, "held_out_kl": left, "none_held_out_kl": started}


def find_writes(task: AdapterTask, model: Loaded, batch: Batch, *, head: bool) -> list[Write]:
    """The modules that write to the residual stream, in the order of execution, and perhaps the output matrix.

    Raises:
        InputError: none is known in this family.
    """
    found = modules_of(model, [ModuleRef(c, path) for c in task.new.components for path in task.new.modules(c)])
    last = model.main.get_output_embeddings()
    tied = last.weight is model.main.get_input_embeddings().weight
    rank = rank_of(task)
    order = [ref for ref, calls in calls_of(model, "new", list(found), batch.first()).items() if calls == 1]
    writes = [
        Write(ref, found[ref], rank)
        for ref in order
        if is_matrix(found[ref]) and found[ref] is not last and named_sides(ref.path).out == "residual"
    ]
    if not writes:
        raise InputError(
            f"no module of a {model.name} is known to write to the residual stream",
            file=model.path,
            remedy="Take a method that runs no model, or refine.",
        )
    # A tied matrix is the embedding, too: a change of it would be one of what the model reads.
    if head and not tied:
        writes += [Write(ref, module, rank) for ref, module in found.items() if module is last]
    return writes


@contextmanager
def applied_twin(task: AdapterTask) -> Iterator[Loaded]:
    """The old base with the adapter."""
    model = twin(task.models.old)
    with applied(model.components, task.adapter):
        yield model


class Wanted:
    """The distribution that is wanted of the new base at every position.

    log q = log p_new + (log p_old+adapter − log p_old) + μ (log p_old − log p_new), up to a constant; for the tokens
    that both bases have. Those of the new base alone keep log p_new.
    """

    def __init__(self, task: AdapterTask, with_adapter: Loaded, settings: TextSettings) -> None:
        self.old, self.new, self.adapted = task.models.old, task.models.new, with_adapter
        self.settings, self.left = settings, _MOST_VALUES
        self.kept: dict[int, Tensor] = {}
        self._columns: tuple[Tensor, Tensor] | None = None

    def of(self, batch: Batch) -> Tensor:
        """log q, (rows, vocabulary)."""
        if id(batch) in self.kept:
            return self.kept[id(batch)]
        before, after = self._olds(batch)
        new = logs(batch.run(self.new, "new"), batch, "new")
        ours, theirs = self._shared(batch, before.shape[-1], new.shape[-1])
        before, after = before[:, ours], after[:, ours]
        pull = self.settings.pull if batch.made_by in ("adapter", "given") else self.settings.keep
        new[:, theirs] += (after - before) + pull * (before - new[:, theirs])
        wanted = new.log_softmax(-1)
        if wanted.numel() <= self.left:
            self.left -= wanted.numel()
            self.kept[id(batch)] = wanted
        return wanted

    def _shared(self, batch: Batch, old: int, new: int) -> tuple[slice | Tensor, slice | Tensor]:
        """The columns of the tokens that both bases have, in the old one's logits and in the new one's."""
        if batch.rows("old") is None:
            # Both read the same ids.
            same = slice(min(old, new))
            return same, same
        if self._columns is None:
            self._columns = shared_tokens(self.old, self.new, old, new)
        return self._columns

    def changes(self, batch: Batch) -> bool:
        """Whether the adapter changes anything in the old base."""
        return not torch.equal(*self._olds(batch))

    def _olds(self, batch: Batch) -> tuple[Tensor, Tensor]:
        before, after = (logs(batch.run(model, "old"), batch, "old") for model in (self.old, self.adapted))
        return before, after


def shared_tokens(old: Loaded, new: Loaded, most_old: int, most_new: int) -> tuple[Tensor, Tensor]:
    """The ids of the tokens that two tokenizers spell alike, in each of them.

    Args:
        old: with a tokenizer.
        new: likewise.
        most_old: ids of the old one from here on have no logits.
        most_new: likewise of the new one.

    Raises:
        InputError: there are too few of them to say what is wanted of the new base's outputs.
    """
    ours, theirs = old.tokenizer.get_vocab(), new.tokenizer.get_vocab()
    both = [(i, theirs[t]) for t, i in ours.items() if i < most_old and theirs.get(t, most_new) < most_new]
    least = min(len(ours), len(theirs))
    if len(both) < max(1.0, _SHARED * least):
        raise InputError(
            f"its outputs can't be compared with the old base's: of the {least} tokens of the smaller vocabulary, "
            f"{len(both)} are in the other, too",
            file=new.path,
            remedy="Take effect, which goes by the layers' outputs, or refine.",
        )
    ids = torch.tensor(sorted(both))
    return ids[:, 0], ids[:, 1]


def logs(logits: Tensor, batch: Batch, side: Any) -> Tensor:
    """log p of every row that answers to one of the other model, (rows, vocabulary)."""
    rows = batch.rows(side)
    flat = logits.float().flatten(0, 1)
    return (flat if rows is None else flat[rows]).log_softmax(-1)


@dataclass(frozen=True)
class Readout:
    """How logits come out of the last stream h: z = lin · h / size(h), for RMS and layer norms.

    Attributes:
        norm: the module before the output matrix.
        head: the output matrix.
        centred: whether the norm takes the mean away.
    """

    norm: nn.Module
    head: nn.Module
    centred: bool

    @classmethod
    def of(cls, model: Loaded, batch: Batch) -> Readout:
        head = model.main.get_output_embeddings()
        leaves: list[nn.Module] = []
        hooks = [
            module.register_forward_pre_hook(lambda m, _: leaves.append(m))
            for module in model.main.modules()
            if not list(module.children())
        ]
        try:
            batch.run(model, "new")
        finally:
            for hook in hooks:
                hook.remove()
        norm = leaves[leaves.index(head) - 1]
        gain = getattr(norm, "weight", None)
        if not isinstance(gain, Tensor) or gain.dim() != 1:
            raise InputError(f"a {model.name} has no norm before its output matrix", file=model.path)
        return cls(norm, head, isinstance(norm, nn.LayerNorm))

    def size(self, h: Tensor) -> Tensor:
        """What the norm divides by, (rows, 1)."""
        h = h - h.mean(-1, keepdim=True) if self.centred else h
        return h.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()

    def matrix(self, h: Tensor, y: Tensor) -> Tensor:
        """``lin`` (vocabulary, width); the norm's own gain is measured, since some families store it less 1."""
        h = (h - h.mean(-1, keepdim=True) if self.centred else h) / self.size(h)
        if isinstance(getattr(self.norm, "bias", None), Tensor):
            # y = gain · h + bias: the slope, whatever the intercept.
            h, y = h - h.mean(0), y - y.mean(0)
        gain = (y * h).mean(0) / h.square().mean(0).clamp_min(1e-12)
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        lin = weight.float() * gain
        return lin - lin.mean(-1, keepdim=True) if self.centred else lin


def held_out(model: Loaded, batches: Sequence[Batch], wanted: Wanted) -> float:
    """Mean KL(wanted ‖ model) in nats a token."""
    total, rows = 0.0, 0
    for batch in batches:
        log_q, log_p = wanted.of(batch), logs(batch.run(model, "new"), batch, "new")
        total += float((log_q.exp() * (log_q - log_p)).sum())
        rows += len(log_q)
    return total / max(rows, 1)


def _solve(
    write: Write,
    model: Loaded,
    batches: Batches,
    readout: Readout,
    wanted: Wanted,
    ridge: float,
    left: float,
) -> float:
    """One write: a Gauss–Newton step of the KL, its length chosen on held-out inputs; the KL that is left there.

    What a write adds to the stream goes straight to the output beside what later blocks make of it; the step looks
    at the straight way alone, and later writes see what came of it.
    """
    sums, metric = _missing(write, model, batches.fit, readout, wanted)
    step = torch.linalg.solve(penalised(metric, 0.05), sums.cross[:, :-1])
    step = torch.linalg.solve(penalised(sums.gram[:-1, :-1], ridge), step, left=False).float()
    before, factors, lost = write.delta, write.factors, write.lost
    best = (left, before, factors, lost)
    for length in _STEPS:
        write.put(before + length * step)
        write.cut(sums.metric(ridge, bias=False))
        now = held_out(model, batches.held_out, wanted)
        if now < best[0]:
            best = (now, write.delta, write.factors, write.lost)
        elif best[0] < left:
            break
    left, delta, write.factors, write.lost = best
    write.put(delta)
    return left


def _missing(
    write: Write, model: Loaded, batches: Sequence[Batch], readout: Readout, wanted: Wanted
) -> tuple[Sums, Tensor]:
    """Sums of the write's inputs and of (q − p) brought to its output, and the mean curvature there."""
    head = write.module is readout.head
    sums = Sums.of(write.module)
    curve: Tensor | None = None
    for batch in batches:
        seen: dict[str, Tensor] = {}
        with _seeing(seen, write.module, readout.norm):
            out = batch.run(model, "new")
        rows = batch.rows("new")
        x, h, y = (part if rows is None else part[rows] for part in (seen["x"], seen["h"], seen["y"]))
        p, q = logs(out, batch, "new").exp(), wanted.of(batch).exp()
        if head:
            g, lin = q - p, None
            part = torch.diag(p.sum(0)) - p.T @ p
        else:
            lin = readout.matrix(h, y)
            # The step in h is size(h) · G⁻¹ linᵀ (q − p), with G = linᵀ (diag(p) − p pᵀ) lin.
            g, mean = (q - p) @ lin * readout.size(h), p @ lin
            part = (lin.T * p.sum(0)) @ lin - mean.T @ mean
        sums.add(x, g)
        curve = part.double() if curve is None else curve + part.double()
    assert curve is not None
    return sums, curve / sums.gram[-1, -1]


@contextmanager
def _seeing(seen: dict[str, Tensor], write: nn.Module, norm: nn.Module) -> Iterator[None]:
    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name == "x":
                seen["x"] = input_rows(module, args[0])
            else:
                seen["h"], seen["y"] = output_rows(module, args[0]), output_rows(module, output)

        return hook

    hooks = [write.register_forward_hook(keep("x")), norm.register_forward_hook(keep("h"))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
