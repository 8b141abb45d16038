"""``regraft migration``: what a foundry publishes once for an upgrade, so that every adapter can follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field
from rich.console import Console
from rich.markup import escape

from regraft.base import open_base
from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.cli._ways import LARGE, say_size
from regraft.cli.lineage import Checked, finish
from regraft.errors import InputError, UsageError
from regraft.fitting import fit_migration
from regraft.hub import hub_id_of
from regraft.lineage.stamp import figures_of
from regraft.migration import Migration, summarise
from regraft.migration_file import load_migration, read_header, save_migration
from regraft.migrations.base_id import called
from regraft.migrations.compose import compose_all
from regraft.migrations.graph import cycles, read_graph
from regraft.migrations.maps import in_memory
from regraft.migrations.model import Header
from regraft.migrations.precision import halved
from regraft.output import check_writable
from regraft.report.schema import Record

app = typer.Typer(help="Make, show, check or compose migrations of base models.", no_args_is_help=True)

Output = Annotated[Path, typer.Option("--output", "-o", metavar="M", help="The .safetensors file to write.")]
License = Annotated[str | None, typer.Option("--license", metavar="SPDX", help="Under which it is published.")]


class MigrationSummary(Record):
    """One migration file, told from its header."""

    file: str
    source: str | None
    source_fingerprint: str | None
    target: str
    target_fingerprint: str
    method: str
    used: str
    transports: dict[str, int]
    similarity: float | None = None
    distance: float | None = None
    license: str | None = None
    composed: list[str]
    bytes: int
    share: float | None = None


class MigrationListing(Record):
    """``migration show --json``."""

    migrations: list[MigrationSummary]
    damaged: list[str] = Field(default_factory=list)
    loose: list[str] = Field(default_factory=list)
    cycles: list[list[str]] = Field(default_factory=list)


@app.command()
def make(
    old: Annotated[Path, typer.Option("--from", metavar="OLD", help="The old base: file, shard index or folder.")],
    new: Annotated[Path, typer.Option("--to", metavar="NEW", help="The new base.")],
    output: Output,
    method: o.MethodOption = "auto",
    subspace_rank: o.SubspaceRank = None,
    energy: o.Energy = None,
    threshold: o.Threshold = None,
    edge: o.Edge = None,
    precision: Annotated[
        str, typer.Option("--precision", help="half: maps in float16 where the error allows it; or full.")
    ] = "half",
    exact: Annotated[
        bool, typer.Option("--exact", help="Also hash every byte of both bases, not a fixed sample alone.")
    ] = False,
    measured: Annotated[
        list[Path] | None,
        typer.Option("--measured", metavar="RECORD.json", help="Add the figures of `verify --json`; repeatable."),
    ] = None,
    license: License = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    threads: o.Threads = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Fit every module of a pair of bases, once for all adapters."""
    if precision not in ("half", "full"):
        raise UsageError(f"--precision {precision!r} is not known", remedy="Known: half, full.")
    check_writable(output, overwrite=overwrite)
    computing = o.use_hardware(device, dtype, threads)
    rank = o.number_or_share(subspace_rank, "--subspace-rank")
    options = o.method_options(
        method,
        subspace_rank=rank,
        energy=energy,
        threshold=o.number_or_word(threshold, "--threshold", "paper"),
        edge=edge,
    )
    figures = tuple(figure for record in measured or () for figure in figures_of(record))
    source, target = open_base(old), open_base(new)
    with progress("Fitting", quiet=quiet) as tick:
        fitted = fit_migration(source, target, method, tick=tick, **computing, **options)
    fitted = replace(fitted, measured=figures)
    if exact:
        fitted = replace(fitted, source=summarise(source, exact=True), target=summarise(target, exact=True))
    _write(halved(fitted) if precision == "half" else fitted, output, license, json, quiet, overwrite)


@app.command()
def compose(
    migrations: Annotated[list[Path], typer.Argument(metavar="M", help="Two or more, from old to new.")],
    output: Output,
    license: License = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """One migration out of several that follow each other: v1 → v2 and v2 → v3 give v1 → v3."""
    if len(migrations) < 2:
        raise UsageError("there is nothing to compose", remedy="Name two or more migrations, from old to new.")
    check_writable(output, overwrite=overwrite)
    composed = compose_all([load_migration(file) for file in migrations])
    _write(halved(composed), output, license, json, quiet, overwrite)


def _write(migration: Migration, output: Path, license: str | None, json: bool, quiet: bool, overwrite: bool) -> None:
    if license is not None:
        migration = replace(migration, license=license)
    save_migration(migration, output, overwrite=overwrite)
    if not (json or quiet):
        say_size(output, migration.base_bytes)
    record = summary(output, read_header(output)[0])
    emit(record, json=json, quiet=quiet, table=lambda console: _tell(record, console))


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="M|FOLDER", help="A migration, or a folder of them.")],
    json: o.Json = False,
) -> None:
    """Print what migrations lead from where to where, by their headers."""
    path = path.expanduser()
    hub_id = hub_id_of(path)
    if not path.is_dir() and (hub_id is None or str(path).endswith(".safetensors")):
        listing = MigrationListing(migrations=[summary(path, read_header(path)[0])])
    else:
        graph = read_graph(path)
        listing = MigrationListing(
            migrations=[summary(edge.file, edge.header) for edge in graph.edges],
            damaged=[str(error) for error in graph.damaged],
            loose=[str(file) for file in graph.loose],
            cycles=[[called(base) for base in ring] for ring in cycles(graph)],
        )
    emit(listing, json=json, quiet=False, table=lambda console: _list(listing, console))


@app.command()
def validate(
    migrations: Annotated[list[Path], typer.Argument(metavar="M", help="Migration files.")],
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Check migrations against the specification, maps included; exits 1 if one is not valid."""
    rows = []
    for path in migrations:
        try:
            in_memory(load_migration(path))
            rows.append(Checked(file=str(path), valid=True))
        except InputError as error:
            rows.append(Checked(file=str(path), valid=False, fault=str(error)))
    finish(rows, json=json, quiet=quiet)


def summary(file: Path, header: Header) -> MigrationSummary:
    """What is told of one file."""
    counts: dict[str, int] = {}
    for row in header.modules:
        counts[row.transport] = counts.get(row.transport, 0) + 1
    size = file.stat().st_size
    forecast = header.outlook
    return MigrationSummary(
        file=str(file),
        source=called(header.source) if header.source is not None else None,
        source_fingerprint=header.source.fingerprint if header.source is not None else None,
        target=called(header.target),
        target_fingerprint=header.target.fingerprint,
        method=header.method,
        used=header.used,
        transports=dict(sorted(counts.items())),
        similarity=forecast.similarity if forecast is not None else None,
        distance=forecast.distance if forecast is not None else None,
        license=header.license,
        composed=list(header.composed),
        bytes=size,
        share=size / header.base_bytes if header.base_bytes else None,
    )


def _tell(record: MigrationSummary, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    say(f"{record.source or 'any base'} → {record.target}, by {record.used}")
    say(f"  {record.source_fingerprint or 'no old base'} → {record.target_fingerprint}")
    say("  " + ", ".join(f"{count} {kind}" for kind, count in record.transports.items()))
    if record.similarity is not None and record.distance is not None:
        say(f"  weights: similarity {record.similarity:.3f}, drift {record.distance:.1%}")
    if record.composed:
        say(f"  composed of {len(record.composed)} migrations")
    say(f"  license: {record.license or 'none stated'}")


def _list(listing: MigrationListing, console: Console) -> None:
    for record in listing.migrations:
        large = " (large: above a tenth of the base)" if (record.share or 0.0) > LARGE else ""
        console.print(f"{escape(record.file)}  {record.bytes / 1e6:.2f} MB{large}", soft_wrap=True)
        _tell(record, console)
    for line in listing.damaged:
        console.print(f"Damaged: {line}", markup=False, soft_wrap=True)
    for line in listing.loose:
        console.print(f"Without an old base, so on no way: {line}", markup=False, soft_wrap=True)
    for ring in listing.cycles:
        console.print(f"Cycle: {' → '.join([*ring, ring[0]])}", markup=False, soft_wrap=True)
