"""Migrations made of two bases by a method, one module in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import UsageError
from regraft.memory import weights_given_back
from regraft.methods import Fit, Method, Outcome, Skip, equal_sizes_only, get_method
from regraft.methods.task import AS_IT_IS, Running
from regraft.migration import Entry, Migration, parameters_of, size_of, summarise
from regraft.narrowing import Narrowing
from regraft.nearness import Nearness, compare
from regraft.pairing import Counterpart, Pairing, pair_bases
from regraft.plan import source_modules
from regraft.removed import Policy, check_policy, rehomed
from regraft.tokens import tables_in
from regraft.transport import Transport
from regraft.updates import LowRank
from regraft.weight_pairs import ComputedWeights, PairedWeights
from regraft.widening import widened, widens

Ticker = Callable[[int, int, str], None]


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
    narrow: bool = False,
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
        narrow: keep of each map only what it does to ``adapter``, where that is less: the migration carries this one
            adapter alone, and holds about as much as it does. See `regraft.narrowing`.
        **options: of the method.

    Raises:
        UsageError: no such method, option or policy, the method depends on the adapter, or there is none to narrow to.
        InputError: a base is damaged.
    """
    chosen = get_method(method)
    if chosen.scope != "pair" and adapter is None:
        raise UsageError(f"method {method!r} depends on the adapter: it has no migration", remedy="Port with it.")
    if narrow and adapter is None:
        raise UsageError("there is no adapter to narrow the migration to", remedy="Give adapter=.")
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
    pairs = PairedWeights(old, new, pairing, paired, running)
    if touched is not None:
        pairs.updates = {module: update for module, update in touched.items() if isinstance(update, LowRank)}
    if narrow and adapter is not None:
        # Through a survivor's maps go the updates of removed blocks, too.
        pairs.narrowing = Narrowing.to(adapter, old, without={pairing.survivors[module] for module in gone})
    computing = ComputedWeights(pairs, device, dtype)
    with weights_given_back():
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
        narrowed=pairs.narrowing is not None and pairs.narrowing.folded,
    )


def _paired(old: Base, new: Base) -> Pairing:
    if old.partial or new.partial:
        from regraft.hub.remote import ahead

        # Only notes which corners of the weights the alignment of depths will read.
        with ahead():
            pair_bases(old, new)
    return pair_bases(old, new)


def _fit(method: Method, settings: Mapping[str, Any], pairs: ComputedWeights, tick: Ticker) -> Fit:
    total = len(pairs.wanted)
    if method.per == "adapter":
        # Planned and judged as a copy; what it makes of the adapter comes once that is not refused.
        copies = dict(zip(pairs.wanted, pairs.side_by_side(partial(_copied, pairs)), strict=True))
        return Fit(copies, method.name)
    if method.per == "pair":
        # Weights are measured as they are loaded, whenever the method gets to that; what it never asks for comes last.
        pairs.pairs.measured = lambda done, module: tick(done, total, str(module))
        fit: Fit = method.function(pairs, **settings)
        for _ in pairs.side_by_side(pairs.nearness):
            pass
        return fit

    def fitted(module: ModuleRef) -> Outcome:
        return pairs.for_adapter(module, _fitted(method, pairs, module, settings))

    outcomes: dict[ModuleRef, Outcome] = {}
    for done, (module, outcome) in enumerate(zip(pairs.wanted, pairs.side_by_side(fitted), strict=True)):
        tick(done, total, str(module))
        outcomes[module] = outcome
    tick(total, total, "")
    return Fit(outcomes, method.name)


def _fitted(method: Method, pairs: ComputedWeights, module: ModuleRef, settings: Mapping[str, Any]) -> Outcome:
    before, after = pairs.shapes(module)
    if before == after and method.needs == ("new",) and not any(settings[name] is not None for name in method.old_for):
        return fit_module(method, None, pairs.load_new(module), settings)
    if method.needs or before != after:
        return fit_module(method, *pairs.load(module), settings)
    # It looks at no weight: measuring them, which needs no copy of either, is all that there is to do.
    pairs.nearness(module)
    return fit_module(method, None, torch.empty(0), settings)


def _copied(pairs: ComputedWeights, module: ModuleRef) -> Outcome:
    outcome = _fitted(get_method("copy"), pairs, module, {})
    return replace(outcome, planned=True) if isinstance(outcome, Skip) else outcome


def fit_module(method: Method, old: Tensor | None, new: Tensor, settings: Mapping[str, Any]) -> Outcome:
    """One module by a per-module method, or a `Skip` where the method can't carry this change of shape."""
    wide = widened(old, new) if old is not None and old.shape != new.shape and not method.resizes else None
    if wide is not None:
        return wide
    if old is not None and old.shape != new.shape and not method.resizes:
        return equal_sizes_only(method.name, old, new)
    outcome: Outcome = method.function(old, new, **settings)
    return outcome


def _entry(
    pairs: PairedWeights,
    module: ModuleRef,
    outcome: Outcome,
    aligned: float | None,
    reason: str,
    moved: dict[int, Tensor],
) -> Entry:
    shape_old, nearness = pairs.old.shape(module), pairs.nearness(module)
    if isinstance(outcome, Skip):
        return Entry(None, None, outcome.reason, shape_old, nearness=nearness, uncovered=not outcome.planned)
    target = pairs.targets[module]
    if widens(shape_old, pairs.new.shape(target)) and not outcome.rotates:
        reason += "; the inputs that the new base added stay its own"
    nearness, row_norms = _carried_nearness(pairs, module, outcome, aligned)
    return Entry(target, outcome.to_cpu(moved), reason, shape_old, pairs.new.shape(target), nearness, False, row_norms)


def _carried_nearness(
    pairs: PairedWeights, module: ModuleRef, transport: Transport, aligned: float | None
) -> tuple[Nearness, Tensor | None]:
    """The nearness as the transport makes it, and the norms of both weights' rows where they can be compared."""
    if widens(pairs.old.shape(module), pairs.new.shape(pairs.targets[module])) and not transport.rotates:
        before, after = pairs.load(module)
        nearness = compare(before, after[:, : before.shape[1]], pairs.updates.get(module))
        return nearness, torch.stack([before.norm(dim=1), after.norm(dim=1)])
    return as_carried(pairs.nearness(module), transport, aligned), pairs.row_norms(module)


def _placed_entry(pairs: PairedWeights, module: ModuleRef, fit: Fit, moved: dict[int, Tensor]) -> Entry:
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
    entries, met, targets = dict(migration.entries), dict[ModuleRef, LowRank](), dict[ModuleRef, Counterpart]()
    for module, update in source_modules(adapter, old).items():
        entry = entries.get(module)
        if entry is not None and entry.target is not None and isinstance(update, LowRank):
            met[module], targets[module] = update, Counterpart(entry.target, "name", entry.reason)
    pairs = PairedWeights(old, new, Pairing(targets), list(met))
    pairs.updates = met
    with weights_given_back():
        for _ in ComputedWeights(pairs, "cpu", torch.float32).side_by_side(pairs.nearness):
            pass
    for module in met:
        entry = entries[module]
        assert entry.transport is not None
        nearness, norms = _carried_nearness(pairs, module, entry.transport, entry.nearness.similarity)
        entries[module] = replace(entry, nearness=nearness, row_norms=norms)
    return replace(migration, entries=entries)
