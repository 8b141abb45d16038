from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.base import open_base
from regraft.check import check as check_adapter
from regraft.check import check_migration
from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.cli._ways import Ends, migration_along
from regraft.errors import Refused, UsageError
from regraft.formats import load_adapter
from regraft.migration_file import check_fingerprints, load_migration
from regraft.output import check_writable, write_text
from regraft.report.junit import Case
from regraft.report.junit import junit as junit_of
from regraft.report.schema import CheckReport
from regraft.report.tables import check_table

_ORDER = ("refused", "refine", "survives")


def check(
    adapter: o.AdapterArgument,
    old: o.From = None,
    new: o.To = None,
    method: o.MethodOption = "auto",
    subspace_rank: o.SubspaceRank = None,
    energy: o.Energy = None,
    threshold: o.Threshold = None,
    edge: o.Edge = None,
    removed: o.Removed = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    components: o.Components = None,
    migration: Annotated[
        Path | None, typer.Option("--migration", metavar="M", help="A saved one, in place of both.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Survey all modules of both bases, not a sample.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Run both models on self-made inputs, for a sharper forecast.")
    ] = False,
    n_inputs: o.NInputs = None,
    seed: o.Seed = 0,
    prompts: o.Prompts = None,
    config: o.Config = None,
    migrations: o.Migrations = None,
    to_fingerprint: o.ToFingerprint = None,
    fail_under: Annotated[
        str | None,
        typer.Option(
            metavar="VERDICT|SHARE", help="Exit 3 below this verdict (survives, refine), or this forecast recovery."
        ),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE.xml", help="Write the verdict as a test's result.")
    ] = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    threads: o.Threads = None,
    report: o.Report = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Will it survive? Plan and diagnostics, without an output file."""
    least = _least(fail_under)
    for path in (report, junit):
        if path is not None:
            check_writable(path, overwrite=overwrite)
    computing = o.use_hardware(device, dtype, threads)
    rank = o.number_or_share(subspace_rank, "--subspace-rank")
    options = o.method_options(
        method,
        subspace_rank=rank,
        energy=energy,
        threshold=o.number_or_word(threshold, "--threshold", "paper"),
        edge=edge,
        removed=removed,
    )
    chosen = o.selection(include, exclude, components)
    running = o.running(n_inputs, seed, prompts, config, device, False) if probe else None
    if probe and (migration is not None or migrations is not None or old is None):
        raise UsageError("--probe runs both bases", remedy="Give --from and --to.")
    if migrations is None and to_fingerprint:
        raise UsageError("--to-fingerprint belongs to --migrations", remedy="Give --migrations FOLDER.")
    if migrations is not None and migration is not None:
        raise UsageError("--migrations excludes --migration", remedy="Give one of them.")
    if (migration is not None or migrations is not None) and (deep or method != "auto" or options):
        raise UsageError(
            "a migration has its method, and needs no survey of the bases",
            remedy="Leave --deep, --method and the method's options out.",
        )
    source, goal = None, None
    if migration is not None or migrations is not None:
        source, goal = (open_base(path) if path is not None else None for path in (old, new))
    if migrations is not None:
        read, _ = migration_along(adapter, migrations, Ends(source, goal, to_fingerprint), (), quiet=quiet or json)
        loaded = load_adapter(adapter, names=o.names_of(read))
        record = check_migration(loaded, read, chosen, source, goal)
    elif migration is not None:
        read = load_migration(migration)
        check_fingerprints(read, source, goal)
        loaded = load_adapter(adapter, names=o.names_of(read))
        record = check_migration(loaded, read, chosen, source, goal)
    else:
        # These two judge by how near the weights are, for which a sample of a base on the hub is enough.
        source, target = o.open_bases(old, new, whole=deep or probe or method not in ("auto", "copy"))
        loaded = load_adapter(adapter, names=o.names_of(source or target), base_config=o.config_of(source or target))
        with progress("Checking", quiet=quiet) as tick:
            looked = {"deep": deep, "probe": running, **computing, **options}
            record = check_adapter(loaded, source, target, method, selection=chosen, tick=tick, **looked)
    if report is not None:
        from regraft.report.html import render_check

        write_text(render_check(record), report, overwrite=overwrite)
    failure = _failure(record, least)
    if junit is not None:
        suite = f"{'' if record.source is None else record.source.path} → {record.target.path}"
        said = "\n".join([record.summary, *record.reasons, *record.warnings])
        write_text(junit_of(suite, [Case(str(adapter), said, failure)]), junit, overwrite=overwrite)
    emit(record, json=json, quiet=quiet, table=lambda console: check_table(record, console))
    if failure:
        raise Refused(failure, file=Path(adapter))


def _least(text: str | None) -> str | float | None:
    """A verdict, or a share of a native adapter's gain."""
    if text is None or text in _ORDER[1:]:
        return text
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        known = ", ".join(_ORDER[1:])
        raise typer.BadParameter(f"{text!r} is none of {known}, and no share from 0 to 1", param_hint="--fail-under")
    return share


def _failure(record: CheckReport, least: str | float | None) -> str:
    """Why the adapter is below what was asked for; empty where it is not."""
    if isinstance(least, str):
        short = _ORDER.index(record.verdict) < _ORDER.index(least)
        return f"the verdict is {record.verdict!r}, below --fail-under {least}" if short else ""
    if least is None:
        return ""
    if record.verdict == "refused":
        return f"the verdict is 'refused', below --fail-under {least:g}"
    forecast = record.forecast.port
    if forecast is None:
        return f"no recovery is forecast, so none of --fail-under {least:g}; --deep or --probe may tell"
    short = forecast.recovery < least
    return f"the forecast recovery is {forecast.recovery:.2f}, below --fail-under {least:g}" if short else ""
