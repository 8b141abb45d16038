"""The fitted transports of one (old, new) pair of bases: made once, used by every adapter, kept as one file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import UsageError
from regraft.families import family_of_base
from regraft.methods import Fit, Method, Outcome, Skip, get_method
from regraft.methods.task import AS_IT_IS, Running
from regraft.nearness import Nearness, compare
from regraft.pairing import Pairing, pair_bases
from regraft.removed import Policy, check_policy, rehomed
from regraft.report.schema import BaseSummary
from regraft.sketch import spread_runs
from regraft.tensors import InMemory, Shape, n_bytes
from regraft.transport import Transport
from regraft.updates import LowRank
from regraft.widening import widened, widens

if TYPE_CHECKING:
    from regraft.carry import Settings
    from regraft.port import PortResult
    from regraft.runtime.record import Statistics

Ticker = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Entry:
    """What a migration knows about one module of the old base.

    Attributes:
        target: the module of the new base; None where it is skipped.
        transport: None where it is skipped.
        reason: why, in plain words.
        shape_old: of the weight in the old base.
        shape_new: of the weight in the new base; None where it is skipped.
        nearness: of the two weights; its adapter fields only where it was fitted for one adapter.
        uncovered: the module changed its shape in a way that the method can't carry: not a planned skip.
        row_norms: (2, out): norms of the old and new weight's rows, which DoRA's magnitude is carried by; only
            between weights of one shape.
        derived: whether similarity and distance are derived from several steps (`regraft.migrations.compose`), not
            measured.
        copies: further modules of the new base that take the update, each with its own transport. A migration file
            holds none.
    """

    target: ModuleRef | None
    transport: Transport | None
    reason: str
    shape_old: Shape
    shape_new: Shape | None = None
    nearness: Nearness = field(default_factory=Nearness)
    uncovered: bool = False
    row_norms: Tensor | None = None
    derived: bool = False
    copies: tuple[Entry, ...] = ()


@dataclass(frozen=True, eq=False)
class Migration:
    """Transports for a pair of bases.

    Attributes:
        source: the old base; None where the method did not need it.
        target: the new base.
        method: as it was asked for.
        used: the method that made the transports (`auto` chooses one).
        reason: why `auto` chose it.
        options: the method's options.
        entries: module of the old base → what becomes of it.
        parameters: component of the old base → names of all its parameters, by which a trained head is known.
        file: where it was read from or written to.
        file_hash: of that file, ``sha256:…``.
        base_bytes: size of the new base as it is stored, which the file's own size is held against.
        license: under which the file is published, an SPDX identifier.
        composed: hashes of the files that it was composed of, in order.
        via: the bases between them.
        measured: figures of ports through it, as a lineage's ``fidelity`` has them.
    """

    source: BaseSummary | None
    target: BaseSummary
    method: str
    used: str
    reason: str
    options: Mapping[str, Any]
    entries: Mapping[ModuleRef, Entry]
    parameters: Mapping[str, Collection[str]] = field(default_factory=dict)
    file: Path | None = field(default=None)
    file_hash: str | None = None
    base_bytes: int | None = None
    license: str | None = None
    composed: tuple[str, ...] = ()
    via: tuple[BaseSummary, ...] = ()
    measured: tuple[Mapping[str, Any], ...] = ()

    @property
    def components(self) -> Mapping[str, Collection[str]]:
        """Component of the old base → its modules."""
        grouped: dict[str, list[str]] = {}
        for component, path in self.entries:
            grouped.setdefault(component, []).append(path)
        return grouped

    def modules(self, component: str) -> Iterator[str]:
        """The old base's modules of one component."""
        return iter(self.components.get(component, ()))

    def port(
        self,
        adapter: Adapter,
        settings: Settings | None = None,
        *,
        old: Base | None = None,
        new: Base | None = None,
    ) -> PortResult:
        """Carry an adapter over; see `regraft.port.apply_migration`."""
        from regraft.carry import Settings
        from regraft.port import apply_migration

        return apply_migration(adapter, self, settings or Settings(), old=old, new=new)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write it as one safetensors file; see `regraft.migration_file`."""
        from regraft.migration_file import save_migration

        return save_migration(self, Path(path), overwrite=overwrite)


def summarise(base: Base, *, exact: bool = False) -> BaseSummary:
    """Path, family and fingerprints of a base; ``exact`` reads all of it, for the hash of every stored byte."""
    prints = base.exact_prints() if exact else base.prints
    return BaseSummary(
        path=str(base.path),
        family=family_of_base(base),
        fingerprint=str(prints),
        structure=base.structure,
        sketch=prints.brief(),
        components={name: part.sample for name, part in prints.components.items()},
        content={name: part.content for name, part in prints.components.items() if part.content is not None},
    )


# Of a weight that lies on the hub, so many runs of so many rows tell how near it is to another.
_ROW_RUNS, _ROWS_OF_RUN = 2, 16


class _Pairs:
    """`WeightPairs` over two bases; an update, where one is given, sharpens the nearness of its module."""

    def __init__(
        self, old: Base, new: Base, pairing: Pairing, wanted: Sequence[ModuleRef], running: Running = AS_IT_IS
    ) -> None:
        self.old, self.new, self._wanted, self.running, self.pairing = old, new, list(wanted), running, pairing
        self.targets = {old: answer.module for old, answer in pairing.counterparts.items() if answer.module is not None}
        self.updates: dict[ModuleRef, LowRank] = {}
        self._nearness: dict[ModuleRef, Nearness] = {}
        self._row_norms: dict[ModuleRef, Tensor] = {}
        self._fetched = False
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
        old, new = self.old.weight(module), self.new.weight(self.targets[module])
        weights = old.float().flatten(1), new.float().flatten(1)
        # Measured on the way: most modules are read just once.
        if module not in self._nearness:
            self._measure(module, *weights)
        return weights

    def nearness(self, module: ModuleRef) -> Nearness:
        if module not in self._nearness and self.sampled:
            self._nearness[module] = self._by_rows(module)
        elif module not in self._nearness:
            self.load(module)
        return self._nearness[module]

    def statistics(self, module: ModuleRef) -> Statistics | None:
        """Of the wanted modules in their order: what has been asked for is not kept."""
        place = {wanted: i for i, wanted in enumerate(self._wanted)}
        while module not in self._ahead:
            known, found = next(self._recorded, (None, None))
            if known is None or found is None:
                return None
            self._ahead[known] = found
            if place[known] > place[module]:
                return None
        return self._ahead.pop(module)

    @cached_property
    def _recorded(self) -> Iterator[tuple[ModuleRef, Statistics]]:
        from regraft.probes.batches import make_batches
        from regraft.runtime.both import BothModels
        from regraft.runtime.record import statistics

        running = self.running
        models = BothModels.load(self.old.path, self.new.path, running.config, running.device)
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

    def _measure(self, module: ModuleRef, old: Tensor, new: Tensor) -> None:
        self._nearness[module] = compare(old, new, self.updates.get(module))
        row_norms = _row_norms(old, new)
        if row_norms is not None:
            self._row_norms[module] = row_norms


def _row_norms(old: Tensor, new: Tensor) -> Tensor | None:
    return torch.stack([old.norm(dim=1), new.norm(dim=1)]) if old.shape == new.shape else None


class _Computing:
    """The same pairs, their weights on the device and in the dtype that the methods compute in."""

    def __init__(self, pairs: _Pairs, device: str, dtype: torch.dtype) -> None:
        self.pairs, self.device, self.dtype = pairs, device, dtype
        self.wanted, self.nearness, self.sampled = pairs.wanted, pairs.nearness, pairs.sampled
        self.statistics = pairs.statistics
        self.pairing, self.bases = pairs.pairing, (pairs.old, pairs.new)

    def __iter__(self) -> Iterator[ModuleRef]:
        return iter(self.pairs)

    def load(self, module: ModuleRef) -> tuple[Tensor, Tensor]:
        old, new = self.pairs.load(module)
        return old.to(self.device, self.dtype), new.to(self.device, self.dtype)

    def weight(self, which: Literal["old", "new"], module: ModuleRef) -> Tensor:
        base = self.pairs.old if which == "old" else self.pairs.new
        return base.weight(module).flatten(1).to(self.device, self.dtype)


def fit_migration(
    old: Base,
    new: Base,
    method: str = "auto",
    *,
    adapter: Adapter | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    running: Running = AS_IT_IS,
    tick: Ticker | None = None,
    removed: Policy = "drop",
    **options: Any,
) -> Migration:
    """Fit the transports from ``old`` to ``new``, one module in memory at a time.

    Args:
        old: the base that adapters were trained on.
        new: the base that they are to run on.
        method: name of a registered method.
        adapter: fit only the modules that it touches, and measure the drift as it meets it. By default, all.
        device: that the methods compute on.
        dtype: that the methods compute in.
        running: how both models are run, by a method that does that.
        tick: called with (modules done, modules in all, module's name).
        removed: what becomes of the updates of blocks that the new base lacks, see `regraft.removed`.
        **options: of the method.

    Raises:
        UsageError: no such method, option or policy, or the method depends on the adapter.
        InputError: a base is damaged.
    """
    from regraft.plan import source_modules
    from regraft.tokens import tables_in

    chosen = get_method(method)
    if chosen.scope != "pair" and adapter is None:
        raise UsageError(f"method {method!r} depends on the adapter: it has no migration", remedy="Port with it.")
    settings = chosen.check_options(options)
    check_policy(removed)
    pairing = _paired(old, new)
    touched = source_modules(adapter, old) if adapter is not None else None
    tables = tables_in(adapter, old) if adapter is not None else []
    wanted = [m for m in pairing.counterparts if touched is None or m in touched or m in tables]
    gone = [] if removed == "drop" else [module for module in wanted if module in pairing.survivors]
    # What is folded into a survivor is carried by its transport, whether or not the adapter touches it.
    needed = dict.fromkeys([*wanted, *(pairing.survivors[module] for module in gone)])
    paired = [module for module in needed if pairing[module].module is not None]
    pairs = _Pairs(old, new, pairing, paired, running)
    if touched is not None:
        pairs.updates = {module: update for module, update in touched.items() if isinstance(update, LowRank)}
    computing = _Computing(pairs, device, dtype)
    fit = _fit(chosen, settings, computing, tick or (lambda done, total, what: None))
    entries: dict[ModuleRef, Entry] = {}
    moved: dict[int, Tensor] = {}
    for module in wanted:
        answer = pairing[module]
        if module in fit.placed:
            entries[module] = _placed_entry(pairs, module, fit, moved)
        elif answer.module is None:
            entries[module] = Entry(None, None, answer.reason, old.shape(module))
        else:
            aligned = fit.similarity.get(module)
            entries[module] = _entry(pairs, module, fit.transports[module], aligned, answer.reason, moved)
    for module in gone:
        if entries[module].target is None:
            survivor = pairing.survivors[module]
            entry = _entry(pairs, survivor, fit.transports[survivor], None, "", moved)
            entries[module] = rehomed(removed, module, survivor, entry, computing)
    return Migration(
        summarise(old),
        summarise(new),
        method,
        fit.method,
        fit.reason,
        settings if removed == "drop" else {**settings, "removed": removed},
        entries,
        parameters_of(old),
        base_bytes=size_of(new),
    )


def size_of(base: Base) -> int:
    """Bytes of a base's tensors as they are stored."""
    return sum(n_bytes(ref) for tensors in base.components.values() for ref in tensors.values())


def _paired(old: Base, new: Base) -> Pairing:
    if old.partial or new.partial:
        from regraft.hub.remote import ahead

        # Only notes which corners of the weights the alignment of depths will read.
        with ahead():
            pair_bases(old, new)
    return pair_bases(old, new)


def parameters_of(base: Base) -> dict[str, tuple[str, ...]]:
    """Component → names of its parameters."""
    return {component: tuple(tensors) for component, tensors in base.components.items()}


def _fit(method: Method, settings: Mapping[str, Any], pairs: _Computing, tick: Ticker) -> Fit:
    total = len(pairs.wanted)
    if method.per == "adapter":
        # Planned and judged as a copy; what it makes of the adapter comes once that is not refused.
        copies = {module: _copied(pairs, module) for module in pairs.wanted}
        return Fit(copies, method.name)
    if method.per == "pair":
        # The measurements are the long part, and the method reads them too: take them where progress can be told.
        for done, module in enumerate(pairs.wanted):
            tick(done, total, str(module))
            pairs.nearness(module)
        fit: Fit = method.function(pairs, **settings)
        return fit
    outcomes: dict[ModuleRef, Outcome] = {}
    for done, module in enumerate(pairs.wanted):
        tick(done, total, str(module))
        outcomes[module] = fit_module(method, *pairs.load(module), settings)
    tick(total, total, "")
    return Fit(outcomes, method.name)


def _copied(pairs: _Computing, module: ModuleRef) -> Outcome:
    outcome = fit_module(get_method("copy"), *pairs.load(module), {})
    return replace(outcome, planned=True) if isinstance(outcome, Skip) else outcome


def fit_module(method: Method, old: Tensor | None, new: Tensor, settings: Mapping[str, Any]) -> Outcome:
    """One module by a per-module method, or a `Skip` where the method can't carry this change of shape."""
    wide = widened(old, new) if old is not None and old.shape != new.shape and not method.resizes else None
    if wide is not None:
        return wide
    if old is not None and old.shape != new.shape and not method.resizes:
        sizes = f"{tuple(old.shape)} there, {tuple(new.shape)} in the new base"
        return Skip(f"{method.name} carries equal sizes only: {sizes}", planned=False)
    outcome: Outcome = method.function(old, new, **settings)
    return outcome


def _entry(
    pairs: _Pairs, module: ModuleRef, outcome: Outcome, aligned: float | None, reason: str, moved: dict[int, Tensor]
) -> Entry:
    shape_old, nearness = pairs.old.shape(module), pairs.nearness(module)
    if isinstance(outcome, Skip):
        return Entry(None, None, outcome.reason, shape_old, nearness=nearness, uncovered=not outcome.planned)
    target = pairs.targets[module]
    nearness = as_carried(nearness, outcome, aligned)
    row_norms = pairs.row_norms(module)
    if widens(shape_old, pairs.new.shape(target)) and not outcome.rotates:
        before, after = pairs.load(module)
        nearness = compare(before, after[:, : before.shape[1]], pairs.updates.get(module))
        row_norms = torch.stack([before.norm(dim=1), after.norm(dim=1)])
        reason += "; the inputs that the new base added stay its own"
    return Entry(target, outcome.to_cpu(moved), reason, shape_old, pairs.new.shape(target), nearness, False, row_norms)


def _placed_entry(pairs: _Pairs, module: ModuleRef, fit: Fit, moved: dict[int, Tensor]) -> Entry:
    """The entry of a module that the method places itself: on one module of the new base or on several."""
    shape_old, aligned = pairs.old.shape(module), fit.similarity.get(module)
    nearness = pairs.nearness(module) if module in pairs.targets else Nearness(similarity=aligned)
    entries, lost = [], Skip("the method gives it no place in the new base")
    for target, outcome in fit.placed[module].items():
        if isinstance(outcome, Skip):
            lost = outcome
            continue
        carried = as_carried(nearness, outcome, aligned)
        same = target == pairs.targets.get(module)
        row_norms = pairs.row_norms(module) if same else None
        where = pairs.pairing[module].reason if same else f"placed on {target}"
        shape_new = pairs.new.shape(target)
        entries.append(Entry(target, outcome.to_cpu(moved), where, shape_old, shape_new, carried, row_norms=row_norms))
    if not entries:
        return Entry(None, None, lost.reason, shape_old, nearness=nearness, uncovered=not lost.planned)
    first, *copies = entries
    if copies:
        further = ", ".join(str(copy.target) for copy in copies)
        first = replace(first, reason=f"{first.reason}; also on {further}", copies=tuple(copies))
    return first


def as_carried(nearness: Nearness, transport: Transport, aligned: float | None) -> Nearness:
    """The nearness of two weights as the transport makes it.

    After a rotation, the similarity is the aligned one, and the raw drift says nothing of what it contains.
    """
    if not transport.rotates:
        return nearness
    return replace(
        nearness,
        similarity=nearness.similarity if aligned is None else aligned,
        contained=None,
        contained_noise=None,
    )


def remeasure(migration: Migration, old: Base, new: Base, adapter: Adapter) -> Migration:
    """A migration that was fitted before, with the nearness of its bases as this adapter meets it.

    Reads the weights of the modules that the adapter touches; nothing is fitted.

    Raises:
        InputError: a base is damaged.
    """
    from regraft.plan import source_modules

    entries = dict(migration.entries)
    for module, update in source_modules(adapter, old).items():
        entry = entries.get(module)
        if entry is None or entry.target is None or not isinstance(update, LowRank):
            continue
        before, after = old.weight(module), new.weight(entry.target)
        measured = compare(before.float().flatten(1), after.float().flatten(1), update)
        row_norms = _row_norms(before.float().flatten(1), after.float().flatten(1))
        assert entry.transport is not None
        nearness = as_carried(measured, entry.transport, entry.nearness.similarity)
        entries[module] = replace(entry, nearness=nearness, row_norms=row_norms)
    return replace(migration, entries=entries)
