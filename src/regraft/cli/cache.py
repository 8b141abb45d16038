from __future__ import annotations

import sys

import typer
from rich.table import Table

from regraft.cache import cache_folder, cached_files, cached_inputs, clear_cache
from regraft.cli._sink import out
from regraft.errors import RegraftError
from regraft.migration_file import load_migration
from regraft.report.schema import Record

app = typer.Typer(help="List or clear the fitted migrations that are kept between runs.", no_args_is_help=True)


class CachedMigration(Record):
    """One file of the cache."""

    file: str
    source: str
    target: str
    method: str
    modules: int
    bytes: int


class CacheListing(Record):
    """``regraft cache list --json``."""

    folder: str
    migrations: list[CachedMigration]


@app.command("list")
def list_(json: bool = typer.Option(False, "--json", help="Print the record as JSON.")) -> None:
    """What is in the cache, newest first."""
    rows = []
    for file in cached_files():
        try:
            found = load_migration(file)
        except RegraftError:
            continue
        rows.append(
            CachedMigration(
                file=str(file),
                source=found.source.path if found.source else "",
                target=found.target.path,
                method=found.method if found.method == found.used else f"{found.method} ({found.used})",
                modules=len(found.entries),
                bytes=file.stat().st_size,
            )
        )
    listing = CacheListing(folder=str(cache_folder()), migrations=rows)
    if json:
        sys.stdout.write(listing.to_json() + "\n")
        return
    out.print(f"{len(rows)} migrations in {listing.folder}", markup=False)
    table = Table(box=None, pad_edge=False)
    for title in ("from", "to", "method", "modules", "MB"):
        table.add_column(title)
    for row in rows:
        table.add_row(row.source, row.target, row.method, str(row.modules), f"{row.bytes / 1e6:.2f}")
    if rows:
        out.print(table)


@app.command()
def clear() -> None:
    """Delete every cached migration, and what is kept of refines."""
    count, inputs = len(cached_files()), len(cached_inputs())
    beside = f" and {inputs} files of refines" if inputs else ""
    out.print(f"{count} migrations{beside} deleted, {clear_cache() / 1e6:.2f} MB freed")
