"""The main job: an adapter, two bases, and back comes the adapter for the new one with a report."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from regraft._version import __version__
from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.base import Base
from regraft.carry import Carrier, Settings
from regraft.errors import InputError, Refused, UsageError
from regraft.fitting import Ticker, fit_migration, fit_module
from regraft.forecast import Judgement
from regraft.forecast.survey import Surveyor
from regraft.joining import joined
from regraft.lineage import with_port
from regraft.lineage.port_entry import port_entry
from regraft.making import make_for
from regraft.memory import peak_mb
from regraft.metadata import BaseName, strip_private, with_base, with_ranks
from regraft.methods import Carried, Skip, get_method
from regraft.methods.task import AS_IT_IS, Running
from regraft.migration import Entry, Migration, parameters_of, summarise
from regraft.narrowing import Narrowing, check_own
from regraft.plan import Selection, check_families, locate, weights_of_wholes, with_shapes_of
from regraft.prepare import Preparation, not_understood, prepare
from regraft.report.schema import Counts, PortedModule, PortReport
from regraft.settling import settled
from regraft.tokens import moved_tokens, tokens_note
from regraft.updates import Update

# A method that keeps less of the update's energy than this is no longer carrying the whole of it.
_KEPT = 0.9


@dataclass(frozen=True)
class PortResult:
    """The ported adapter and what became of each module."""

    adapter: Adapter
    report: PortReport

    def save(self, path: str | Path, *, format: str | None = None, overwrite: bool = False) -> list[Path]:
        """See `Adapter.save`."""
        return self.adapter.save(path, format=format, overwrite=overwrite)


def fit_for(
    adapter: Adapter,
    old: Base | None,
    new: Base,
    method: str = "auto",
    *,
    selection: Selection = Selection(),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    running: Running = AS_IT_IS,
    tick: Ticker | None = None,
    narrow: bool = False,
    **options: Any,
) -> Migration:
    """The migration for what is selected of one adapter, without an old base where the method allows that.

    With ``narrow``, it is of that adapter alone, see `regraft.fitting.fit_migration`.

    Raises:
        Refused: the adapter is for another family.
        UsageError: the method compares both bases and ``old`` is None, or it lacks an option.
    """
    check_families(adapter, old, new)
    chosen_part = selection.of(adapter)
    # With nothing selected one module will do: it is the carrying that says that nothing is left.
    adapter = chosen_part if chosen_part.updates else replace(adapter, updates=dict(islice(adapter.updates.items(), 1)))
    if old is not None:
        computing: dict[str, Any] = {"device": device, "dtype": dtype, "running": running, "tick": tick}
        return fit_migration(old, new, method, adapter=adapter, narrow=narrow, **computing, **options)
    # Nothing tells what was removed.
    options.pop("removed", None)
    chosen, reason = get_method(method), ""
    if method == "auto":
        chosen, reason = get_method("copy"), "no old base was given to compare the new one with"
    if "old" in chosen.needs or chosen.runs:
        raise UsageError(
            f"method {method!r} compares both bases", remedy="Give --from, or take --method copy or lora-x."
        )
    settings = chosen.check_options(options)
    entries: dict[ModuleRef, Entry] = {}
    narrowing = Narrowing.to(adapter, new) if narrow else Narrowing({})
    named = {**weights_of_wholes(adapter, new), **locate(adapter, new, "new").modules}
    modules = sorted(set(named.values()))
    weights = [module for module in modules if f"{module.path}.weight" in new.components[module.component]]
    for done, module in enumerate(weights):
        if tick is not None:
            tick(done, len(weights), str(module))
        shape = new.shape(module)
        weight = new.weight(module).to(device, dtype).flatten(1) if chosen.needs else torch.empty(0)
        outcome = fit_module(chosen, None, weight, settings)
        if isinstance(outcome, Skip):
            entries[module] = Entry(None, None, outcome.reason, shape, uncovered=not outcome.planned)
        else:
            # Of this module alone: the memory of one that was dropped comes back as another's.
            kept = narrowing(module, outcome, shape, shape).to_cpu({})
            entries[module] = Entry(module, kept, "same name", shape, shape)
    names = parameters_of(new)
    told = (method, chosen.name, reason, settings)
    return Migration(None, summarise(new), *told, entries, names, narrowed=narrowing.folded)


def apply_migration(
    adapter: Adapter,
    migration: Migration,
    settings: Settings = Settings(),
    *,
    old: Base | None = None,
    new: Base | None = None,
    tick: Ticker | None = None,
    started: float | None = None,
    surveyor: Surveyor | None = None,
) -> PortResult:
    """Carry an adapter over.

    Args:
        adapter: as it was read.
        migration: for its bases.
        settings: how it is to come out.
        old: needed only for parameters that the adapter stores whole.
        new: likewise.
        tick: called with (modules done, modules in all, module's name).
        started: `time.perf_counter` at the start of the whole job, where that began before.
        surveyor: see `regraft.prepare.prepare`.

    Raises:
        Refused: the verdict is a refusal, and it is not forced.
        InputError: a key or shape is not understood, and ``allow_partial`` is off; a tensor holds NaN or Inf.
        UsageError: the migration is narrowed to another adapter.
    """
    started = time.perf_counter() if started is None else started
    if migration.digest is not None:
        migration.digest.begin()
    recut = settings.rank not in (None, "full")
    weakened = settings.strength != 1.0 or bool(settings.block_strength)
    adapter = with_shapes_of(adapter, migration, old)
    ready = prepare(
        adapter,
        migration,
        settings.selection,
        old,
        new,
        recut=recut,
        weakened=weakened,
        weights_only=settings.running.weights_only,
        surveyor=surveyor,
    )
    if migration.narrowed:
        check_own(adapter, migration, ready.located.modules)
    judgement = ready.judgement
    if judgement.verdict == "refused" and not settings.force:
        raise Refused(judgement.reasons[0], file=adapter.path, remedy="--force overrides, and is recorded in the file.")
    if ready.problems and not settings.allow_partial:
        raise not_understood(adapter, ready.problems)
    made = make_for(adapter, ready, settings, old, new, tick)
    if isinstance(made, str):
        migration = replace(migration, reason=f"{migration.reason}; {made}" if migration.reason else made)
    elif made is not None:
        migration = replace(migration, used=made.method, reason=made.reason)
    ready = replace(ready, migration=migration)
    carrier = Carrier(adapter, ready, settings, old, new)
    landed: dict[ModuleRef, list[Update]] = {}
    rows: list[PortedModule] = []

    def keep(row: PortedModule, target: ModuleRef | None, carried: Update | None) -> None:
        rows.append(row)
        if carried is None or target is None:
            return
        if isinstance(made, Carried):
            # Made of the whole adapter: several of its modules may name the same result.
            landed[target] = [carried]
        else:
            landed.setdefault(target, []).append(carried)

    for done, (ref, update) in enumerate(adapter.updates.items()):
        if tick is not None:
            tick(done, len(adapter.updates), str(ref))
        if isinstance(made, Carried):
            keep(*carrier.adopt(ref, update, made))
            continue
        row, target, carried = carrier.carry(ref, update)
        keep(row, target, carried)
        if carried is not None:
            for place, part in carrier.copies(ref, update):
                landed.setdefault(place, []).append(part)
    if isinstance(made, Carried):
        for added in carrier.added(made, {row.target for row in rows if row.target}):
            keep(*added)
    updates, rows = joined(landed, rows, 1.0 if settings.rank == "full" else settings.rank, adapter.path)
    held, rows = settled(adapter, updates, rows, new)
    updates = dict(held.updates)
    if settings.save_dtype is not None:
        updates = {place: update.cast(settings.save_dtype) for place, update in updates.items()}
    tokens = {token: ref for token, ref in adapter.tokens.items() if str(token) not in ready.problems}
    tokens = moved_tokens(tokens, migration)
    named = {*adapter.unrecognised, *map(str, adapter.tokens)}
    rows += [
        PortedModule(name=key, target=None, status="refused", reason=why, energy_kept=None, rank_in=None, rank_out=None)
        for key, why in ready.problems.items()
        if key in named
    ]
    if not updates:
        raise InputError(
            "no module is left to carry", file=adapter.path, remedy="Check --include, --exclude, --components."
        )
    figures = dict(made.figures) if isinstance(made, Carried) else {}
    judgement = judgement if isinstance(made, Carried) else _after(judgement, migration.used, rows)
    counts = Counts(
        **{status: sum(row.status == status for row in rows) for status in ("ported", "skipped", "refused")}
    )
    report = PortReport(
        regraft_version=__version__,
        input=str(adapter.path),
        outputs=[],
        method=migration.used,
        method_reason=migration.reason,
        options={name: value for name, value in migration.options.items() if value is not None},
        figures=figures,
        verdict=judgement.verdict if migration.source is not None else None,
        summary=_summary(counts, judgement, ready),
        reasons=[*judgement.reasons, *([tokens_note(tokens, old, new, migration)] if tokens else [])],
        forced=judgement.verdict == "refused",
        counts=counts,
        skipped_share=sum(ready.evidence.shares.get(ref, 0.0) for ref in ready.evidence.skipped),
        modules=rows,
        unrecognised=list(adapter.unrecognised),
        tokens=[str(token) for token in tokens],
        left_behind=list(adapter.left_behind),
        source=migration.source,
        target=migration.target,
        migration=str(migration.file) if migration.file else None,
        seconds=time.perf_counter() - started,
        peak_mb=peak_mb(),
    )
    config = held.config
    if config is not None:
        name, revision = base_name(migration.target.path)
        config = {**config, "base_model_name_or_path": name, "revision": revision}
    ported = replace(
        held,
        updates=updates,
        metadata=with_port(adapter, port_entry(report, settings, migration, adapter)),
        config=config,
        tokens=tokens,
        unrecognised=(),
        base_config=new.configs.get(MODEL) if new is not None else adapter.base_config,
    )
    metadata = with_base(ported.metadata, _told(migration), old_family=adapter.family)
    same_kinds = {u.kind for u in updates.values()} <= {u.kind for u in adapter.updates.values()}
    same = settings.rank is None and not isinstance(made, Carried) and same_kinds
    ported = replace(ported, metadata=metadata if same else with_ranks(metadata, updates.values()))
    if not settings.private:
        ported, removed = strip_private(ported)
        report = report.model_copy(update={"removed": removed})
    return PortResult(ported, report)


def _told(migration: Migration) -> BaseName:
    path = migration.target.path
    name, _ = base_name(path)
    return BaseName.of(path, migration.target.family, name if name != path else None)


def port(
    adapter: Adapter,
    old: Base | None,
    new: Base,
    method: str = "auto",
    *,
    settings: Settings = Settings(),
    tick: Ticker | None = None,
    **options: Any,
) -> PortResult:
    """Fit and carry in one call; see `fit_for` and `apply_migration`."""
    started = time.perf_counter()
    computing: dict[str, Any] = {"selection": settings.selection, "running": settings.running, "tick": tick}
    migration = fit_for(adapter, old, new, method, narrow=True, **computing, **options)
    return apply_migration(adapter, migration, settings, old=old, new=new, started=started)


def base_name(path: str) -> tuple[str, str | None]:
    """Name and revision that PEFT's config gives a base: the hub's own where it lies in the hub's cache, else its path.

    >>> base_name("/cache/models--org--name/snapshots/abc123")
    ('org/name', 'abc123')
    """
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{7,40})", path)
    if hub is not None:
        # As a migration names a base.
        return hub[1], hub[2]
    parts = Path(path).parts
    for i, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[i + 1] == "snapshots":
            return part.removeprefix("models--").replace("--", "/"), parts[i + 2]
    return path, None


def _summary(counts: Counts, judgement: Judgement, ready: Preparation) -> str:
    forced = " Forced against a refusal." if judgement.verdict == "refused" else ""
    total = counts.ported + counts.skipped + counts.refused
    return f"{counts.ported} of {total} modules ported by {ready.migration.used}. {judgement.summary}{forced}"


def _after(judgement: Judgement, method: str, rows: list[PortedModule]) -> Judgement:
    """The verdict on the pair, lowered where the method itself lost much of the update on the way."""
    known = [(row.share or 0.0, row.energy_kept) for row in rows if row.energy_kept is not None]
    total = sum(share for share, _ in known)
    kept = sum(share * energy for share, energy in known) / total if total > 0 else 1.0
    if judgement.verdict != "survives" or kept >= _KEPT:
        return judgement
    lost = f"{method} kept {kept:.0%} of the update's ‖ΔW‖² on the way, where a copy keeps all of it"
    return replace(
        judgement,
        verdict="refine",
        summary="The new base is near, but the method left much of the update behind: measure it with `verify`.",
        reasons=(lost, *judgement.reasons),
    )
