"""What all adapters of one pair of bases share: the bases themselves, the fitted migration, the surveys."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePath
from time import perf_counter
from typing import Any

import torch

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base, open_base
from regraft.batch.done import Keys
from regraft.batch.options import FITTED_BY, RowOptions
from regraft.cache import find_cached, keep
from regraft.fitting import fit_migration, remeasure
from regraft.forecast import Survey
from regraft.forecast.survey import survey
from regraft.methods import get_method
from regraft.migration import Migration, summarise
from regraft.migration_file import check_fingerprints, load_migration
from regraft.migrations.maps import in_memory
from regraft.pairing import Pairing, pair_bases
from regraft.plan import Selection, check_families
from regraft.port import fit_for
from regraft.report.schema import BaseSummary

#: What decides a fit; the other options are each adapter's own.
_DECIDING = ("migration", *FITTED_BY, "n_inputs", "seed", "weights_only")
_COMPUTING = {"device": "cpu", "dtype": torch.float32}
# Adapters of one trainer change the same modules; a library has few such sets.
_MOST_SURVEYS = 64


@dataclass(frozen=True)
class PairSpec:
    """Two bases and how their migration is fitted."""

    source: str
    target: str
    options: RowOptions

    @classmethod
    def of(cls, source: str, target: str, options: RowOptions) -> PairSpec:
        """The pair of a row, with those of its options that decide the fit."""
        deciding = {name: getattr(options, name) for name in _DECIDING}
        return cls(source, target, RowOptions(**deciding))


@dataclass(frozen=True, eq=False)
class Fitted:
    """A pair as it travels to the workers.

    Attributes:
        spec: which.
        migration: for every module of the pair; None where the method depends on the adapter.
        note: why there is none, or why `auto` chose its method.
        old: summary of the old base.
        new: of the new base.
        known: keys of all that earlier runs have made.
        check: forecast only.
        seconds: that the fit took.
    """

    spec: PairSpec
    migration: Migration | None
    note: str
    old: BaseSummary
    new: BaseSummary
    known: Keys = field(default_factory=Keys)
    check: bool = False
    seconds: float = 0.0


def fit_pair(spec: PairSpec, known: Keys, *, check: bool = False) -> Fitted:
    """Fit what the adapters of a pair can share; methods that depend on the adapter share the open bases alone.

    Raises:
        RegraftError: a base or the migration that is given can't be read, all of it, or the method does not apply.
        Refused: that migration is one of other bases.
    """
    started = perf_counter()
    old, new = open_base(spec.source), open_base(spec.target)
    if spec.options.migration is None:
        migration = _fit(spec, old, new)
        note = f"method {spec.options.method} depends on each adapter" if migration is None else migration.reason
    else:
        migration = _read(spec.options.migration, old, new)
        note = f"migration {PurePath(spec.options.migration).name}"
    ends = summarise(old), summarise(new)
    return Fitted(spec, migration, note, *ends, known, check, perf_counter() - started)


def _read(place: str, old: Base, new: Base) -> Migration:
    migration = load_migration(place)
    check_fingerprints(migration, old, new)
    # A worker may be on a machine that has no such file.
    held = in_memory(migration)
    if held.digest is not None:
        # Asked for here, an error is the pair's; on the pair's way to a worker it would be each row's.
        held.digest.result()
    return held


def _fit(spec: PairSpec, old: Base, new: Base) -> Migration | None:
    method, options = get_method(spec.options.method), {**_COMPUTING, **spec.options.method_options()}
    if method.scope != "pair" or method.per == "adapter":
        return None
    running = spec.options.running()
    # As for a single port: a copy costs nothing to fit, and how models are run is no part of the cache's key.
    kept = method.name != "auto" and bool(method.needs) and not method.runs
    everything = [ModuleRef(name, path) for name in old.components for path in old.modules(name)]
    found = find_cached(old, new, method.name, options, everything) if kept else None
    if found is not None:
        # One that was fitted just now has no file; it lets methods that look at the adapter do so.
        # In memory: a worker may be on a machine that has no such cache.
        return replace(in_memory(found), file=None)
    fitted = fit_migration(old, new, method.name, running=running, **options)
    if kept:
        keep(fitted, old, new, method.name, options)
    return fitted


@dataclass(eq=False)
class OpenPair:
    """A pair in a worker: bases open, and what was found out about them kept for the next adapter."""

    fitted: Fitted
    old: Base
    new: Base
    _surveys: dict[frozenset[ModuleRef], Survey] = field(default_factory=dict)

    @classmethod
    def of(cls, fitted: Fitted) -> OpenPair:
        """Open both bases."""
        return cls(fitted, open_base(fitted.spec.source), open_base(fitted.spec.target))

    @cached_property
    def pairing(self) -> Pairing:
        """Which module answers to which."""
        return pair_bases(self.old, self.new)

    def survey(self, touched: Collection[ModuleRef]) -> Survey:
        """See `regraft.forecast.survey.survey`; the same modules are looked at once."""
        modules = frozenset(touched)
        if modules not in self._surveys:
            if len(self._surveys) >= _MOST_SURVEYS:
                self._surveys.clear()
            self._surveys[modules] = survey(self.old, self.new, modules, pairing=self.pairing)
        return self._surveys[modules]

    def migration_for(self, adapter: Adapter, new: Base, options: RowOptions, selection: Selection) -> Migration:
        """The shared migration as this adapter meets it, or one fitted for it alone.

        Args:
            adapter: as it was read.
            new: the pair's new base, or one expert of it, whose migration is never shared.
            options: of the row.
            selection: of the adapter's modules.

        Raises:
            Refused: the adapter is for another family.
        """
        if self.fitted.migration is None or new is not self.new:
            given: dict[str, Any] = {**_COMPUTING, **options.method_options()}
            running = options.running()
            given |= {"selection": selection, "running": running, "narrow": True}
            return fit_for(adapter, self.old, new, options.method, **given)
        check_families(adapter, self.old, self.new)
        return remeasure(self.fitted.migration, self.old, self.new, selection.of(adapter))
