from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from regraft.adapter import Adapter
from regraft.base import Base, open_base
from regraft.cache import MOST_KEPT, find_cached, keep, size_at_most
from regraft.carry import Settings
from regraft.check import check_migration
from regraft.cli import _options as o
from regraft.cli._sink import Ticker, emit, emit_list, progress
from regraft.cli._ways import Ends, migration_along, say_size
from regraft.errors import UsageError
from regraft.experts import experts, labelled
from regraft.fitting import fit_migration, remeasure
from regraft.formats import get_format, load_adapter
from regraft.methods import get_method
from regraft.migration import Migration, size_of
from regraft.migration_file import check_fingerprints, load_migration
from regraft.migrations.digest import FileDigest
from regraft.migrations.graph import Way
from regraft.migrations.precision import halved
from regraft.output import check_writable, whole, write_text
from regraft.plan import check_families, source_modules
from regraft.port import apply_migration, fit_for
from regraft.prepare import check_understood
from regraft.report.schema import CheckReport, PortReport
from regraft.report.tables import check_table, port_table


def port(
    adapter: o.AdapterArgument,
    old: o.From = None,
    new: o.To = None,
    output: o.Output = None,
    method: o.MethodOption = "auto",
    subspace_rank: o.SubspaceRank = None,
    energy: o.Energy = None,
    threshold: o.Threshold = None,
    edge: o.Edge = None,
    pull: o.Pull = None,
    ridge: o.Ridge = None,
    n_inputs: o.NInputs = None,
    seed: o.Seed = 0,
    prompts: o.Prompts = None,
    config: o.Config = None,
    weights_only: o.WeightsOnly = False,
    removed: o.Removed = None,
    anchors: o.Anchors = None,
    strength: Annotated[float, typer.Option("--strength", help="Factor on the whole update.")] = 1.0,
    block_strength: o.BlockStrength = None,
    rank: Annotated[str | None, typer.Option("--rank", metavar="N|SHARE|keep|full", help="Rank of the output.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="Of the output; by default the input's.")] = None,
    save_dtype: Annotated[str | None, typer.Option("--save-dtype", help="Of the output's tensors.")] = None,
    strip_private: Annotated[
        bool, typer.Option("--strip-private", help="Leave out paths, names, prompts and tag lists; lists them.")
    ] = False,
    include: o.Include = None,
    exclude: o.Exclude = None,
    components: o.Components = None,
    migration: o.SavedMigration = None,
    migrations: o.Migrations = None,
    to_fingerprint: o.ToFingerprint = None,
    via: Annotated[
        list[str] | None,
        typer.Option("--via", metavar="FILE|BASE", help="--migrations: the way passes this; repeatable."),
    ] = None,
    save_migration: Annotated[
        Path | None,
        typer.Option("--save-migration", metavar="M", help="Fit every module of the pair and keep it."),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither read nor write the cache.")] = False,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    threads: o.Threads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Leave the unknown behind.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Port against a refusal; recorded in the file.")] = False,
    report: o.Report = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Carry it over: a file for the new base in the adapter's own format."""
    started = perf_counter()
    if output is None and not dry_run:
        raise UsageError("--output is missing", remedy="Give the ported file's name with -o, or --dry-run.")
    for path in (output, report, save_migration):
        if path is not None and not dry_run:
            check_writable(path, overwrite=overwrite, source=adapter)
    computing = o.use_hardware(device, dtype, threads)
    if format is not None:
        get_format(format)
    rank_out = o.wanted_rank(rank)
    subspace = o.number_or_share(subspace_rank, "--subspace-rank")
    options = o.method_options(
        method,
        subspace_rank=subspace,
        energy=energy,
        threshold=o.number_or_word(threshold, "--threshold", "paper"),
        edge=edge,
        pull=o.pull(pull),
        ridge=ridge,
        removed=removed,
        anchors=anchors,
    )
    running = o.running(n_inputs, seed, prompts, config, device, weights_only)
    if migrations is None and (to_fingerprint or via):
        raise UsageError("--to-fingerprint and --via belong to --migrations", remedy="Give --migrations FOLDER.")
    if migrations is not None and (migration or save_migration):
        raise UsageError("--migrations excludes --migration and --save-migration", remedy="Give one of them.")
    read = load_migration(migration) if migration is not None else None
    way: Way = ()
    source: Base | None
    target: Base | None
    named: Base | Migration
    if read is None and migrations is None:
        source, target = o.open_bases(old, new)
        named, which = (source or target), "old" if source is not None else "new"
    else:
        source, target = (open_base(path) if path is not None else None for path in (old, new))
        if migrations is not None:
            read, way = migration_along(
                adapter, migrations, Ends(source, target, to_fingerprint), via or [], quiet=quiet
            )
        assert read is not None
        check_fingerprints(read, source, target)
        named, which = read, "old" if read.source is not None else "new"
    loaded = load_adapter(adapter, names=o.names_of(named), base_config=o.config_of(source or target))
    settings = Settings(
        selection=o.selection(include, exclude, components),
        strength=o.finite(strength, "--strength"),
        block_strength=o.block_strengths(block_strength, loaded),
        rank=rank_out,
        save_dtype=o.dtype(save_dtype, "--save-dtype") if save_dtype is not None else None,
        allow_partial=allow_partial,
        force=force,
        private=not strip_private,
        running=running,
    )
    if not allow_partial and loaded.updates:
        check_understood(loaded, named, which, settings.selection)
    run = _Run(
        loaded,
        source,
        settings,
        method,
        {**computing, **options},
        read,
        way,
        migration,
        save_migration,
        dry_run=dry_run,
        cached=not no_cache,
        format=format,
        json=json,
        quiet=quiet,
        overwrite=overwrite,
        started=started,
    )
    apart = experts(loaded, source, target) if read is None and target is not None and save_migration is None else {}
    if not apart:
        run.tell(run(target, output, report))
        if save_migration is not None and target is not None and not (dry_run or json or quiet):
            say_size(save_migration, size_of(target))
        return
    for path in (output, report):
        if path is not None and not dry_run:
            for label in apart:
                check_writable(labelled(path, label), overwrite=overwrite, source=adapter)
    records: list[CheckReport | PortReport] = []
    try:
        for label, expert in apart.items():
            records.append(run(expert, *(labelled(path, label) if path else None for path in (output, report))))
            if not json:
                run.tell(records[-1])
    finally:
        # Of the first one, too, where the second can't be made: its file is there.
        if json and records:
            emit_list(records)


@dataclass(frozen=True)
class _Run:
    """One port, from what the command line asked for to the files and the printed record."""

    adapter: Adapter
    source: Base | None
    settings: Settings
    method: str
    options: dict[str, Any]
    read: Migration | None
    way: Way
    migration: Path | None
    save_migration: Path | None
    dry_run: bool
    cached: bool
    format: str | None
    json: bool
    quiet: bool
    overwrite: bool
    started: float

    def __call__(self, target: Base | None, output: Path | None, report: Path | None) -> CheckReport | PortReport:
        """Port to one base, or make the plan of it."""
        adapter, source, settings, read = self.adapter, self.source, self.settings, self.read
        alone = settings.running.weights_only
        with ExitStack() as stack:
            tick = stack.enter_context(progress("Porting", quiet=self.quiet))
            if read is None:
                assert target is not None
                job = _Job(adapter, source, target, self.method, settings, self.options)
                read = job.fit(tick, whole=self.save_migration is not None, cached=self.cached)
                if self.save_migration is not None and not self.dry_run:
                    # Written first, since the ported file names it by its hash; it takes its place with that file.
                    staged = stack.enter_context(whole(self.save_migration))
                    read.save(staged)
                    read = replace(read, digest=FileDigest(staged))
            elif source is not None and target is not None:
                read = remeasure(read, source, target, adapter)
            if self.dry_run:
                return check_migration(adapter, read, settings.selection, source, target, weights_only=alone)
            result = apply_migration(adapter, read, settings, old=source, new=target, tick=tick, started=self.started)
            assert output is not None
            written = result.save(output, format=self.format, overwrite=self.overwrite)
        record = self._record(result.report, read, written)
        if report is not None:
            from regraft.report.html import render_port

            checked = check_migration(adapter, read, settings.selection, source, target, weights_only=alone)
            write_text(render_port(record, check=checked), report, overwrite=self.overwrite)
        return record

    def tell(self, record: CheckReport | PortReport) -> None:
        """Print the record."""
        table = partial(check_table, record) if isinstance(record, CheckReport) else partial(port_table, record)
        emit(record, json=self.json, quiet=self.quiet, table=table)

    def _record(self, record: PortReport, read: Migration, written: Sequence[Path]) -> PortReport:
        way = [str(edge.place or edge.file) for edge in self.way]
        record = record.model_copy(update={"outputs": [str(file) for file in written], "path": way})
        # One on the hub lies in the hub's cache.
        kept = self.save_migration or (read.file if self.migration is not None else None)
        if kept is None:
            return record
        named = str(self.save_migration or self.migration)
        return record.model_copy(update={"migration": named, "migration_bytes": kept.stat().st_size})


@dataclass(frozen=True)
class _Job:
    """What is to be fitted for one command."""

    adapter: Adapter
    source: Base | None
    target: Base
    method: str
    settings: Settings
    options: dict[str, Any]

    def fit(self, tick: Ticker, *, whole: bool, cached: bool) -> Migration:
        """The migration: for every module of the pair (``whole``), from the cache, or for this adapter alone.

        What is not kept is narrowed to the adapter: it holds no more than that, however large the bases are.
        """
        source, target, selection = self.source, self.target, self.settings.selection
        if source is not None and whole:
            check_families(self.adapter, source, target)
            # Rounded as the file is to be: a port through it gives the same bytes as this one.
            running = self.settings.running
            fitted = fit_migration(source, target, self.method, running=running, tick=tick, **self.options)
            return halved(remeasure(fitted, source, target, self.adapter))
        # `auto` chooses by the modules at hand, and a copy costs nothing to fit: neither is worth a file. What depends
        # on the adapter or on how the models are run can't be one.
        chosen_method = get_method(self.method)
        once = self.method == "auto" or not chosen_method.needs or chosen_method.per == "adapter" or chosen_method.runs
        if source is None or not cached or once:
            return self._fit(tick, narrow=True)
        check_families(self.adapter, source, target)
        chosen = selection.of(self.adapter)
        modules = source_modules(chosen, source)
        found = find_cached(source, target, self.method, self.options, modules)
        if found is not None and chosen.updates:
            return remeasure(found, source, target, chosen)
        large = size_at_most(source, modules) > MOST_KEPT
        fitted = self._fit(tick, narrow=large)
        if not large:
            keep(fitted, source, target, self.method, self.options)
        return fitted

    def _fit(self, tick: Ticker, *, narrow: bool) -> Migration:
        return fit_for(
            self.adapter,
            self.source,
            self.target,
            self.method,
            selection=self.settings.selection,
            running=self.settings.running,
            tick=tick,
            narrow=narrow,
            **self.options,
        )
