"""The weights of two bases side by side, as methods are given them: read one pair at a time, measured on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.base import Base
from regraft.methods import Shapes
from regraft.methods.task import AS_IT_IS, Running
from regraft.migrations.spill import Spill
from regraft.nearness import Nearness, compare, measure
from regraft.pairing import Pairing
from regraft.parallel import side_by_side
from regraft.sketch import spread_runs
from regraft.tensors import InMemory
from regraft.transport import Deferred, Transport
from regraft.updates import LowRank

if TYPE_CHECKING:
    from regraft.methods import Outcome
    from regraft.narrowing import Narrowing
    from regraft.runtime.record import Statistics

T = TypeVar("T")

# Of a weight that lies on the hub, so many runs of so many rows tell how near it is to another.
_ROW_RUNS, _ROWS_OF_RUN = 2, 16
# Modules that are read ahead of the one at work.
_AHEAD = 6


class PairedWeights:
    """`WeightPairs` over two bases; an update, where one is given, sharpens the nearness of its module."""

    def __init__(
        self, old: Base, new: Base, pairing: Pairing, wanted: Sequence[ModuleRef], running: Running = AS_IT_IS
    ) -> None:
        self.old, self.new, self._wanted, self.running, self.pairing = old, new, list(wanted), running, pairing
        self.targets = {old: answer.module for old, answer in pairing.counterparts.items() if answer.module is not None}
        self.updates: dict[ModuleRef, LowRank] = {}
        self.narrowing: Narrowing | None = None
        self._nearness: dict[ModuleRef, Nearness] = {}
        #: Called with how many wanted modules have been measured, and the last of them; by one thread at a time.
        self.measured: Callable[[int, ModuleRef], None] = lambda done, module: None
        self._done, self._noting = 0, Lock()
        self._row_norms: dict[ModuleRef, Tensor] = {}
        self._fetched = False
        self._places, self._announced = {module: place for place, module in enumerate(self._wanted)}, 0
        self._ahead: dict[ModuleRef, Statistics] = {}

    @property
    def sampled(self) -> bool:
        return self.old.partial or self.new.partial

    @property
    def wanted(self) -> Sequence[ModuleRef]:
        return self._wanted

    def __iter__(self) -> Iterator[ModuleRef]:
        return iter(self.targets)

    def load(self, module: ModuleRef) -> tuple[Tensor, Tensor]:
        # Each is let go before the next is converted: of a large weight, four copies are a good part of all memory.
        stored = deque(self._stored(module))
        return stored.popleft().float(), stored.popleft().float()

    def load_new(self, module: ModuleRef) -> Tensor:
        """The new weight alone, for methods that look at no other; both are measured as by `load`."""
        return self._stored(module)[1].float()

    def nearness(self, module: ModuleRef) -> Nearness:
        if module not in self._nearness and self.sampled:
            self._note(module, self._by_rows(module))
        elif module not in self._nearness:
            self._stored(module)
        return self._nearness[module]

    def shapes(self, module: ModuleRef) -> Shapes:
        old, new = self.old.shape(module), self.new.shape(self.targets[module])
        return (old[0], prod(old[1:])), (new[0], prod(new[1:]))

    def _stored(self, module: ModuleRef) -> tuple[Tensor, Tensor]:
        """Both weights as matrices, in the dtypes that they are stored in."""
        self._announce_after(module)
        old, new = self.old.weight(module).flatten(1), self.new.weight(self.targets[module]).flatten(1)
        # Measured on the way: most modules are read just once.
        if module not in self._nearness:
            found = measure(old, new, self.updates.get(module))
            if found.row_norms is not None:
                self._row_norms[module] = found.row_norms
            self._note(module, found.nearness)
        return old, new

    def _note(self, module: ModuleRef, nearness: Nearness) -> None:
        with self._noting:
            # Methods load modules beyond the wanted ones, too.
            counts = module in self._places and module not in self._nearness
            self._nearness[module] = nearness
            if counts:
                self._done += 1
                self.measured(self._done, module)

    def _announce_after(self, module: ModuleRef) -> None:
        """Have the system read what comes next while this module is computed."""
        here = self._places.get(module)
        if here is None:
            return
        ahead = range(max(self._announced, here + 1), min(here + 1 + _AHEAD, len(self._wanted)))
        for place in ahead:
            self.old.announce(self._wanted[place])
            self.new.announce(self.targets[self._wanted[place]])
        self._announced = max(self._announced, ahead.stop)

    def statistics(self, module: ModuleRef) -> Statistics | None:
        """Of the wanted modules in their order: what has been asked for is not kept."""
        while module not in self._ahead:
            known, found = next(self._recorded, (None, None))
            if known is None or found is None:
                return None
            self._ahead[known] = found
            if self._places[known] > self._places[module]:
                return None
        return self._ahead.pop(module)

    @cached_property
    def _recorded(self) -> Iterator[tuple[ModuleRef, Statistics]]:
        from regraft.probes.batches import make_batches
        from regraft.runtime.both import BothModels
        from regraft.runtime.record import statistics

        running = self.running
        models = BothModels.load(self.old, self.new, running.config, running.device)
        batches = make_batches(models, None, running.n_inputs, running.seed, running.prompts, held_out=0)
        return statistics(models, {module: self.targets[module] for module in self._wanted}, batches.fit)

    def _by_rows(self, module: ModuleRef) -> Nearness:
        """The nearness as a sample of the weights' rows shows it."""
        if not self._fetched:
            from regraft.hub.remote import ahead

            self._fetched = True
            with ahead():
                for wanted in self._wanted:
                    self._rows(wanted)
        pair = self._rows(module)
        if pair is None:
            return Nearness()
        old, new, rows = pair
        update = self.updates.get(module)
        if update is not None:
            held = torch.cat([torch.arange(part.start, part.stop) for part in rows])
            fits = update.up.shape[0] == self.old.shape(module)[0]
            update = replace(update, up=InMemory(update.up.load()[held]), magnitude=None) if fits else None
        return compare(old, new, update)

    def _rows(self, module: ModuleRef) -> tuple[Tensor, Tensor, list[range]] | None:
        target, shape = self.targets[module], self.old.shape(module)
        if self.new.shape(target) != shape:
            return None
        few = shape[0] <= _ROW_RUNS * _ROWS_OF_RUN
        rows = [range(shape[0])] if few else spread_runs(shape[0], _ROW_RUNS, _ROWS_OF_RUN)
        old, new = self.old.rows(module, rows), self.new.rows(target, rows)
        return old.float().flatten(1), new.float().flatten(1), rows

    def row_norms(self, module: ModuleRef) -> Tensor | None:
        self.nearness(module)
        return self._row_norms.get(module)


class ComputedWeights:
    """The same pairs, their weights on the device and in the dtype that the methods compute in."""

    def __init__(self, pairs: PairedWeights, device: str, dtype: torch.dtype) -> None:
        self.pairs, self.device, self.dtype = pairs, device, dtype
        self.wanted, self.nearness, self.sampled = pairs.wanted, pairs.nearness, pairs.sampled
        self.statistics, self.shapes = pairs.statistics, pairs.shapes
        self.pairing, self.bases = pairs.pairing, (pairs.old, pairs.new)
        self._spill = Spill()

    def __iter__(self) -> Iterator[ModuleRef]:
        return iter(self.pairs)

    def load(self, module: ModuleRef) -> tuple[Tensor, Tensor]:
        old, new = self.pairs.load(module)
        return old.to(self.device, self.dtype), new.to(self.device, self.dtype)

    def load_new(self, module: ModuleRef) -> Tensor:
        return self.pairs.load_new(module).to(self.device, self.dtype)

    def side_by_side(self, function: Callable[[ModuleRef], T]) -> Iterator[T]:
        """See `regraft.methods.WeightPairs`."""
        # A device works at one thing at a time, and what is fetched from the hub is fetched in one go.
        alone = torch.device(self.device).type != "cpu" or self.sampled
        return side_by_side(function, self.wanted, 1 if alone else None, size=self._bytes)

    def _bytes(self, module: ModuleRef) -> int:
        """Of both weights, as they are loaded."""
        return sum(rows * columns for rows, columns in self.shapes(module)) * self.dtype.itemsize

    def for_adapter(self, module: ModuleRef, outcome: Outcome, target: ModuleRef | None = None) -> Outcome:
        narrowing = self.pairs.narrowing
        if not isinstance(outcome, Transport):
            return outcome
        if narrowing is None:
            # What is deferred may hold whole weights; what it makes is this module's alone.
            return self._spill(outcome.held()) if isinstance(outcome, Deferred) else outcome
        shape_new = self.pairs.new.shape(self.pairs.targets[module] if target is None else target)
        found = narrowing(module, outcome, self.pairs.old.shape(module), shape_new)
        # Where nothing is folded, whole maps come of what was deferred.
        return self._spill(found) if isinstance(outcome, Deferred) and type(found) is Transport else found

    def weight(self, which: Literal["old", "new"], module: ModuleRef) -> Tensor:
        base = self.pairs.old if which == "old" else self.pairs.new
        return base.weight(module).flatten(1).to(self.device, self.dtype)
