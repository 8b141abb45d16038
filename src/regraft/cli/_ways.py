"""``port --migrations FOLDER``: the way from the adapter's own base to the new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.base import Base
from regraft.cli._sink import err, out
from regraft.errors import InputError, UsageError
from regraft.lineage import KEY, parse_lineage
from regraft.lineage.model import BaseId, Lineage
from regraft.lineage.stamp import metadata_of
from regraft.migration import Migration
from regraft.migrations.base_id import base_id, called
from regraft.migrations.graph import Way, along, find_way, read_graph, told
from regraft.migrations.recognise import recognise

#: Share of the base's size above which a migration is large.
LARGE = 0.1
_SMALLER = "--subspace-rank"


@dataclass(frozen=True)
class Ends:
    """What the command says of the two ends.

    Attributes:
        old: the base that the adapter was trained on; None to take the lineage's.
        new: the base that it is to run on.
        to: its fingerprint, where it is not at hand.
    """

    old: Base | None
    new: Base | None
    to: str | None


def migration_along(
    adapter: Path, folder: Path, ends: Ends, via: Sequence[str], *, quiet: bool
) -> tuple[Migration, Way]:
    """The composed migration that the folder has for an adapter; the way is told on stderr.

    Raises:
        InputError: there is no way, or the adapter does not say what base it is for.
        UsageError: there are several, or no goal is given.
    """
    if (ends.new is None) == (ends.to is None):
        raise UsageError(
            "--migrations takes one goal",
            remedy="Give --to NEW, or --to-fingerprint with what `regraft fingerprint` prints.",
        )
    goal = BaseId(fingerprint=_checked(ends.to)) if ends.new is None else BaseId.model_validate(base_id(ends.new))
    components: tuple[str, ...] = ()
    if ends.old is not None:
        start = BaseId.model_validate(base_id(ends.old))
    else:
        lineage = lineage_in(adapter)
        start = lineage.base
        components = tuple({name for group in lineage.updates for name in group.modules})
    graph = read_graph(folder)
    if not quiet:
        for error in graph.damaged:
            err.print(f"Left out: {error}", markup=False, soft_wrap=True)
    known = graph.bases()
    found = recognise(start, known, components), recognise(goal, known, components)
    way = find_way(graph, found[0].base, found[1].base, via)
    if not quiet:
        for given, taken in zip((start, goal), found, strict=True):
            if taken.how:
                line = f"{called(given)} is taken as {called(taken.base)}: {taken.how}"
                err.print(line, markup=False, soft_wrap=True)
        err.print(f"Way: {told(way)}", markup=False, soft_wrap=True)
    return along(way), way


def say_size(file: Path, base_bytes: int | None) -> None:
    """One line on a written migration's size, with a warning above a tenth of the base's."""
    size = file.stat().st_size
    share = size / base_bytes if base_bytes else 0.0
    of_base = f", {share:.1%} of the new base" if base_bytes else ""
    out.print(f"Migration: {file} ({size / 1e6:.2f} MB{of_base})", markup=False, soft_wrap=True)
    if share > LARGE:
        err.print(
            f"Warning: above a tenth of the base's size; a method with smaller maps, or {_SMALLER}, makes it smaller.",
            markup=False,
            soft_wrap=True,
        )


def _checked(fingerprint: str | None) -> str:
    if fingerprint is None or not 8 <= len(fingerprint) <= 4096 or not all("!" <= c <= "~" for c in fingerprint):
        raise UsageError(f"--to-fingerprint {fingerprint!r} is none", remedy="It looks like v1:4f2a….")
    return fingerprint


def lineage_in(adapter: Path) -> Lineage:
    """The lineage of an adapter file or folder.

    Raises:
        InputError: it has no lineage.
    """
    file = adapter
    text = metadata_of(file).get(KEY)
    if text is None:
        raise InputError(
            "does not say which base it is for (no lineage)",
            file=file,
            remedy="Give the base with --from, or write it in once: `regraft lineage stamp ADAPTER --base OLD`.",
        )
    return Lineage.model_validate(parse_lineage(text, file=file))
