"""Effect matching: layer by layer, in closed form, give every module the change of output that it had."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn

from regraft.adapter import Adapter, ModuleRef
from regraft.errors import UsageError
from regraft.methods import Carried, method
from regraft.methods._choosing import HeldOut
from regraft.methods._moments import Moments, cut_in
from regraft.methods.task import AdapterTask
from regraft.probes.batches import Batch, make_batches
from regraft.removed import is_stream, removed_writes
from regraft.runtime.applied import applied
from regraft.runtime.both import modules_of, twin
from regraft.runtime.libraries import quiet_libraries
from regraft.runtime.load import Loaded
from regraft.runtime.record import as_output, calls_of, input_rows, is_conv1d, is_matrix, matrix_of, output_rows
from regraft.runtime.walk import Walk, Walks
from regraft.spaces import named_sides
from regraft.updates import Update

Cut = Literal["inputs", "plain"]
#: Pulls that are tried where evidence is to choose.
PULLS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Sweep:
    """How one sweep over the layers is made.

    Attributes:
        pull: μ, 0 to 1.
        ridge: λ in mean squares of a module's inputs.
        cut: metric of the cut to the wanted rank.
        times: so many times the wanted rank.
    """

    pull: float = 0.5
    ridge: float = 0.3
    cut: Cut = "inputs"
    times: int = 1


@method(
    "effect",
    reference="regraft's own; ridge with the copy as prior, reduced-rank regression (Izenman 1975)",
    summary="Layer by layer, in closed form, gives each module the change of output that the adapter made on the old "
    "base, on inputs that the bases make themselves.",
    needs=("old", "new", "models"),
    scope="adapter",
    per="adapter",
    resizes=True,
)
def effect(
    task: AdapterTask,
    *,
    pull: float | Literal["auto"] = 0.5,
    ridge: float = 0.3,
    cut: Cut = "inputs",
) -> Carried:
    """Modules in the order of execution, with the ported layers below at work: wanted is y_t + e + μ (y_s − y_t).

    With inputs x_t' of the new base as ported so far, outputs y_s, y_s' of the old base without and with the adapter,
    and y_t of the new base alone: e = y_s' − y_s, and ΔW_t solves
    min ‖(W_t + ΔW_t) x_t' − (y_t + e + μ (y_s − y_t))‖² + λ ‖ΔW_t − ΔW_copy‖². The cut to the wanted rank is made
    before the layers above are solved, so that they make up for it.

    Where the new base lacks blocks, what a removed block wrote to the residual stream is wanted of its surviving
    neighbour's write (`regraft.removed.removed_writes`), and each write also makes up for what those before it left
    missing in the stream.

    Args:
        task: the adapter and both bases.
        pull: μ, how far to pull towards the old base's own outputs, 0 to 1; ``auto`` takes the one of 0, 0.5 and 1
            that does best on held-out inputs (`regraft.methods._choosing`).
        ridge: λ in units of the mean diagonal of Σ x_t' x_t'ᵀ.
        cut: in the metric of the ``inputs`` (reduced-rank regression), or ``plain`` (truncated SVD of ΔW).
    """
    if cut not in ("inputs", "plain"):
        raise UsageError(f"no cut is named {cut!r}", remedy="Known: inputs, plain.")
    if not ridge > 0:
        raise UsageError(f"--ridge {ridge} is out of range", remedy="Give a number above 0.")
    started = perf_counter()
    choosing = pull == "auto"
    with quiet_libraries():
        inputs = make_batches(
            task.models,
            task.adapter,
            task.running.n_inputs,
            task.seed,
            task.prompts,
            held_out=None if choosing else 0,
        )
        made = perf_counter()
        sweeps = [Sweep(each, ridge, cut) for each in (PULLS if pull == "auto" else (pull,))]
        found = sweep_layers(task, inputs.fit, sweeps)
        best = 0
        if choosing:
            held = HeldOut(task, inputs.held_out)
            errors = [held.score(carried.updates).total() for carried in found]
            best = min(range(len(errors)), key=errors.__getitem__)
    figures = {"seconds_inputs": made - started, "seconds_layers": perf_counter() - made}
    return replace(found[best], figures={**found[best].figures, **figures}, reason=inputs.made)


@torch.no_grad()
def sweep_layers(task: AdapterTask, batches: Sequence[Batch], sweeps: Sequence[Sweep]) -> list[Carried]:
    """One pass through the layers for each sweep, all side by side: the other models run once for all of them."""
    layers = Layers.of(task, batches[0].first())
    with ExitStack() as stack:
        streams = _Streams(task, layers, batches, len(sweeps), stack)
        results = [_Result() for _ in sweeps]
        for done, (ref, target) in enumerate(layers.order.items()):
            task.tick(done, len(layers.order), str(ref))
            moments = streams.collect(ref, target, sweeps)
            for i, sweep in enumerate(sweeps):
                _solve(task, layers, ref, target, moments[i], sweep, results[i])
                streams.put(i, target, results[i].factors)
    return [_carried(task, layers, result, sweep) for result, sweep in zip(results, sweeps, strict=True)]


@dataclass
class _Result:
    """What a sweep has made so far; the product of ``factors`` is the newest ΔW_t, (out, in)."""

    updates: dict[ModuleRef, Update] = field(default_factory=dict)
    lost: dict[ModuleRef, float] = field(default_factory=dict)
    factors: tuple[Tensor, ...] = ()
    before: float = 0.0
    after: float = 0.0


@dataclass(frozen=True)
class Layers:
    """The modules that are solved for.

    Attributes:
        order: old module → new module, in the order of execution in the new base.
        copies: new module → the copy's ΔW (out, in), where it has one.
        why_not: old module → why it is left to the copy.
        folded: old module → modules of removed blocks whose writes to the stream are wanted from it too.
        biases: new module → the copy's change of its bias (out,), where it has one: that is kept as it is.
        transposed: new modules that keep their weight as (in, out).
    """

    order: Mapping[ModuleRef, ModuleRef]
    copies: Mapping[ModuleRef, Tensor]
    why_not: Mapping[ModuleRef, str]
    folded: Mapping[ModuleRef, tuple[ModuleRef, ...]] = field(default_factory=dict)
    biases: Mapping[ModuleRef, Tensor] = field(default_factory=dict)
    transposed: Collection[ModuleRef] = ()

    @classmethod
    def of(cls, task: AdapterTask, batch: Batch) -> Layers:
        pairs = {ref: task.target(ref) for ref in task.modules}
        known = {ref: target for ref, target in pairs.items() if target is not None}
        why_not = {ref: task.pairing[ref].reason for ref in pairs if ref not in known}
        old, new = task.models.old, task.models.new
        runs_old = calls_of(old, "old", list(known), batch)
        runs_new = calls_of(new, "new", list(known.values()), batch)
        here, there = modules_of(old, known), modules_of(new, known.values())
        back = {target: ref for ref, target in known.items()}
        order: dict[ModuleRef, ModuleRef] = {}
        for target, calls in runs_new.items():
            ref = back[target]
            alike = is_matrix(here[ref]) and is_matrix(there[target])
            if calls == 1 and runs_old.get(ref) == 1 and alike:
                same = matrix_of(here[ref]).shape[0] == matrix_of(there[target]).shape[0]
                if same:
                    order[ref] = target
        for ref in known:
            if ref not in order:
                why_not[ref] = "the models don't run it once, as a matrix of the same outputs"
        copied = task.copied().updates
        copies = {target: _matrix(there[target], copied[target]) for target in order.values() if target in copied}
        biases = {target: bias for ref, target in order.items() if (bias := task.bias(ref)) is not None}
        transposed = {target for target in order.values() if is_conv1d(there[target])}
        return cls(order, copies, why_not, removed_writes(task.pairing, order), biases, transposed)


def _matrix(module: nn.Module, update: Update) -> Tensor:
    """ΔW of an update on a module, (out, in · kh · kw)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().float().cpu()
    changed = (update.merged(weight).reshape(weight.shape) - weight).to(weight)
    return changed.T if is_conv1d(module) else changed.flatten(1)


class _Missing:
    """What the residual streams of one sweep still lack, by batch and stream: later writes make up for it."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, str], Tensor] = {}
        self._asked: list[tuple[int, str, Tensor, Tensor]] = []

    def wanted(self, batch: int, stream: str, x: Tensor, change: Tensor) -> Tensor:
        """The change (N, out) that is wanted of a write on inputs x (N, in), with what is missing by then."""
        self._asked.append((batch, stream, x, change))
        held = self._held.get((batch, stream))
        return change if held is None else change + held

    def settle(self, factors: Sequence[Tensor]) -> None:
        """Note what a write's solution leaves missing, ΔW (out, in) being the product of its factors."""
        for batch, stream, x, change in self._asked:
            rest = change - _through(factors, x)
            held = self._held.get((batch, stream))
            self._held[batch, stream] = rest if held is None else held + rest
        self._asked.clear()


def _through(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """x ΔWᵀ of rows x (N, in), ΔW being the product of its factors."""
    for factor in reversed(factors):
        x = x @ factor.to(x).T
    return x


@dataclass(frozen=True)
class _Stop:
    """Where a ported new base stands: a walk before a module, what the module reads, and the base's output on that."""

    walk: Walk[ModuleRef]
    input: Tensor
    output: Tensor


class _Streams:
    """Old base, old base with the adapter, new base, and one ported new base for each sweep, walked side by side."""

    def __init__(
        self, task: AdapterTask, layers: Layers, batches: Sequence[Batch], ported: int, stack: ExitStack
    ) -> None:
        old, new = task.models.old, task.models.new
        with_adapter = twin(old)
        stack.enter_context(applied(with_adapter.components, task.adapter))
        rest = _left_to_the_copy(task, layers)
        self.ported = [twin(new) for _ in range(ported)]
        for model in self.ported:
            stack.enter_context(applied(model.components, rest))
        self.new = modules_of(new, layers.order.values())
        self.folded = layers.folded
        own = modules_of(self.ported[0], layers.order.values())
        brought = {target: (layers.biases.get(target), _added_bias(self.new[target], own[target])) for target in own}
        # What comes on a module's bias as it is, (out,) each: no ΔW is to make it.
        self.biases = {target: [bias for bias in pair if bias is not None] for target, pair in brought.items()}
        gone = [ref for refs in layers.folded.values() for ref in refs]
        olds, news = [*layers.order, *gone], list(layers.order.values())
        self.walks = [
            stack.enter_context(_walks(old, "old", olds, batches, "after")),
            stack.enter_context(_walks(with_adapter, "old", olds, batches, "after")),
            stack.enter_context(_walks(new, "new", news, batches, "after")),
        ]
        self.ported_walks = [
            stack.enter_context(_walks(model, "new", news, batches, "instead")) for model in self.ported
        ]
        self.missing = [_Missing() for _ in range(ported)]
        self.stops: list[list[_Stop]] = [[] for _ in range(ported)]
        self.rows = [(batch.rows("old"), batch.rows("new")) for batch in batches]

    def collect(self, ref: ModuleRef, target: ModuleRef, sweeps: Sequence[Sweep]) -> list[Moments]:
        """The least-squares problem of one module for every sweep."""
        module = self.new[target]
        out, inp = matrix_of(module).shape
        moments = [Moments.of(out, inp) for _ in sweeps]
        stream = named_sides(ref.path).out if self.folded and is_stream(ref) else None
        for i in range(len(self.rows)):
            y_s, y_a, y_t = (
                self._outputs(walks, i, key) for walks, key in zip(self.walks, (ref, ref, target), strict=True)
            )
            for gone in self.folded.get(ref, ()):
                y_s, y_a = y_s + self._outputs(self.walks[0], i, gone), y_a + self._outputs(self.walks[1], i, gone)
            for j, sweep in enumerate(sweeps):
                walk = self.ported_walks[j].walks[i]
                stop = walk.at(target)
                assert stop is not None
                # The base's own module: what it gives without a change, on what it reads now.
                output, rows = module.forward(stop[0]), input_rows(module, stop[0])
                self.stops[j].append(_Stop(walk, stop[0], output))
                now, x = (_chosen(part, self.rows[i][1]) for part in (output_rows(module, output), rows))
                # (y_t − now) + (y_a − y_s) + μ (y_s − y_t), with one new tensor.
                change = (y_t - y_s).mul_(1 - sweep.pull).add_(y_a).sub_(now)
                for bias in self.biases[target]:
                    change -= bias.to(change)
                moments[j].add(x, change if stream is None else self.missing[j].wanted(i, stream, x, change))
        return moments

    def _outputs(self, walks: Walks[ModuleRef], i: int, key: ModuleRef) -> Tensor:
        stop = walks.walks[i].at(key)
        assert stop is not None
        assert stop[1] is not None
        side = 1 if walks is self.walks[2] else 0
        return _chosen(output_rows(nn.Identity(), stop[1]), self.rows[i][side])

    def put(self, sweep: int, target: ModuleRef, factors: Sequence[Tensor]) -> None:
        """Change what a ported module gives, ΔW being the product of the factors; the next layers read that."""
        self.missing[sweep].settle(factors)
        first, *rest = factors
        for stop in self.stops[sweep]:
            # Read anew: a convolution's rows are its input many times over, too much to hold for all batches.
            x = input_rows(self.new[target], stop.input)
            # One pass over the output, which is nobody else's.
            rows = output_rows(nn.Identity(), stop.output).addmm_(_through(rest, x), first.to(x).T)
            for bias in self.biases[target]:
                rows += bias.to(rows)
            stop.walk.answer(as_output(rows, stop.output))
        self.stops[sweep].clear()


def _added_bias(base: nn.Module, ported: nn.Module) -> Tensor | None:
    """What the copy put on a module's bias, (out,); None for nothing."""
    here, there = base.bias, ported.bias
    if not isinstance(there, Tensor):
        return None
    if not isinstance(here, Tensor):
        return there.detach()
    return None if torch.equal(here, there) else there.detach() - here.detach()


def _chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows.to(x.device)]


def _walks(
    model: Loaded,
    side: Literal["old", "new"],
    refs: Sequence[ModuleRef],
    batches: Sequence[Batch],
    when: Literal["instead", "after"],
) -> Walks[ModuleRef]:
    runs = [lambda batch=batch: batch.run(model, side) for batch in batches]
    return Walks(runs, modules_of(model, refs), when)


def _left_to_the_copy(task: AdapterTask, layers: Layers) -> Adapter:
    """The copy's updates that are not solved for: whole parameters, embeddings, modules that can't be."""
    solved = set(layers.order.values())
    return replace(task.adapter, updates={r: u for r, u in task.copied().updates.items() if r not in solved})


def _solve(
    task: AdapterTask,
    layers: Layers,
    ref: ModuleRef,
    target: ModuleRef,
    moments: Moments,
    sweep: Sweep,
    result: _Result,
) -> None:
    """One module: solve, cut, and note the update."""
    prior = layers.copies.get(target)
    prior = torch.zeros_like(moments.cross) if prior is None else prior.double()
    delta = moments.solve(prior, sweep.ridge)
    result.before += moments.square
    rank = task.rank_of(ref)
    transposed = target in layers.transposed
    if rank is None:
        name, update = task.dense(ref, (delta.T if transposed else delta).float())
        result.updates[name] = update
        result.factors = (delta.float(),)
    else:
        rank = rank if isinstance(rank, float) else min(sweep.times * rank, *delta.shape)
        up, down, lost = cut_in(delta, rank, moments.metric(sweep.ridge) if sweep.cut == "inputs" else None)
        factors = (down.T.contiguous(), up.T.contiguous()) if transposed else (up, down)
        made = task.made(ref, *factors)
        result.updates[target], result.lost[target] = made, lost
        result.factors = (up, down)
        delta = up @ down
    result.after += moments.left(delta)


def _carried(task: AdapterTask, layers: Layers, result: _Result, sweep: Sweep) -> Carried:
    left = _left_to_the_copy(task, layers).updates
    updates = {**left, **result.updates}
    skipped = {ref: why for ref, why in layers.why_not.items() if (t := task.target(ref)) is None or t not in updates}
    figures = {
        "pull": sweep.pull,
        "times_rank": float(sweep.times),
        "modules": float(len(layers.order)),
        # Of what the modules were to change, the share that they did not.
        "left": result.after / max(result.before, 1e-30),
    }
    return Carried(updates, "effect", skipped=skipped, figures=figures, lost=result.lost)


__all__ = ["PULLS", "Layers", "Sweep", "effect", "sweep_layers"]
