"""``regraft lineage``: what an adapter belongs to and where it came from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from regraft.base import open_base
from regraft.cli import _options as o
from regraft.cli._sink import emit, out
from regraft.errors import InputError, UsageError
from regraft.lineage import KEY, dumped, parse_lineage
from regraft.lineage.model import BaseId, Lineage, Lost, UpdateGroup
from regraft.lineage.name_sets import count
from regraft.lineage.stamp import metadata_of, stamp, with_measured, write_with_metadata
from regraft.report.schema import Record

app = typer.Typer(help="Show, check or write what an adapter belongs to.", no_args_is_help=True)


class Checked(Record):
    """One file of ``lineage validate --json`` or ``migration validate --json``."""

    file: str
    valid: bool
    fault: str | None = None


class Validation(Record):
    """``lineage validate --json``, ``migration validate --json``."""

    files: list[Checked]


@app.command()
def show(adapter: o.AdapterArgument, json: o.Json = False) -> None:
    """Print the lineage: the base, and every port on the way."""
    lineage = _read(adapter)
    if json:
        sys.stdout.write(dumped(lineage) + "\n")
        return
    _tell(Lineage.model_validate(lineage), out)


@app.command()
def validate(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Adapters; or lineages as .json files.")],
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Check lineages against the specification; exits 1 if one is not valid."""
    rows = []
    for path in adapters:
        try:
            _read(path)
            rows.append(Checked(file=str(path), valid=True))
        except InputError as error:
            rows.append(Checked(file=str(path), valid=False, fault=str(error)))
    finish(rows, json=json, quiet=quiet)


def finish(rows: list[Checked], *, json: bool, quiet: bool) -> None:
    """Print what a validation found; an `InputError` if there was a fault."""

    def table(console: Console) -> None:
        for row in rows:
            said = "valid" if row.valid else escape(row.fault or "")
            console.print(f"{escape(row.file)}: {said}" if row.valid else said, soft_wrap=True)

    emit(Validation(files=rows), json=json, quiet=quiet, table=table)
    faulty = [row for row in rows if not row.valid]
    if faulty:
        raise InputError(f"{len(faulty)} of {len(rows)} files are not valid")


@app.command("stamp")
def stamp_(
    adapter: o.AdapterArgument,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="BASE", help="The base that it was trained on, or ported to.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option("--measured", metavar="RECORD.json", help="Add the figures of `verify --json` to the last port."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Also hash every byte of the base, not a fixed sample alone.")
    ] = False,
    output: o.Output = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace the adapter's own file.")] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Write a lineage into an adapter that has none; no byte of its tensors changes."""
    if (output is None) == (not in_place):
        raise UsageError("--output or --in-place", remedy="Give one of them.")
    if (base is None) == (measured is None):
        raise UsageError("--base or --measured", remedy="Give one: a first lineage, or figures of its last port.")
    target = adapter if output is None else output
    replace_it = overwrite or in_place
    if base is not None:
        lineage = stamp(adapter, open_base(base), target, exact=exact, overwrite=replace_it)
    else:
        assert measured is not None
        lineage = with_measured(_read(adapter), measured)
        write_with_metadata(adapter, target, {KEY: dumped(lineage)}, overwrite=replace_it)
    if json:
        sys.stdout.write(dumped(lineage) + "\n")
    elif not quiet:
        _tell(Lineage.model_validate(lineage), out)


def _read(path: Path) -> dict[str, Any]:
    path = path.expanduser()
    if path.suffix == ".json":
        return parse_lineage(_text(path), file=path)
    text = metadata_of(path).get(KEY)
    if text is None:
        raise InputError("has no lineage", file=path, remedy="`regraft lineage stamp ADAPTER --base BASE` writes one.")
    return parse_lineage(text, file=path)


def _text(path: Path) -> str:
    from regraft.errors import reading

    with reading(path):
        return path.read_text(encoding="utf-8")


def _tell(lineage: Lineage, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    say(f"For {_base(lineage.base)}")
    for group in lineage.updates:
        say(f"  {_group(group)}")
    for number, port in enumerate(lineage.ports, 1):
        origin = _base(port.source) if port.source is not None else "an unknown base"
        say(f"Port {number}: from {origin} by {port.method}{', forced' if port.forced else ''}")
        for base in port.via:
            say(f"  by way of {_base(base)}")
        for kept in port.kept:
            energy = "" if kept.energy is None else f", {kept.energy:.0%} of the update's ‖ΔW‖²"
            say(f"  kept: {_count(kept.modules)} modules{energy}")
        for lost in port.lost:
            say(f"  {_lost(lost)}")
        for found in port.fidelity:
            value = "not defined" if found.value is None else f"{found.value:.3g}"
            say(f"  measured: {found.measure} {value} ({found.how})")


def _base(base: BaseId) -> str:
    family = f", {base.family}" if base.family else ""
    return f"{base.name or 'a base'} ({base.fingerprint}{family})"


def _group(group: UpdateGroup) -> str:
    facts = [f"factor {group.scale}"] if group.scale else []
    facts += [f"magnitude per {group.axis}"] if group.axis else []
    return f"{group.kind}: {_count(group.modules)} modules{', ' if facts else ''}{', '.join(facts)}"


def _lost(lost: Lost) -> str:
    share = "" if lost.share is None else f", {lost.share:.1%} of the update"
    return f"{lost.status}: {_count(lost.modules)} modules{share}: {lost.reason}"


def _count(modules: dict[str, list[str]]) -> int:
    return sum(count(patterns) for patterns in modules.values())
