"""``regraft fingerprint``: which weights a base holds, and how far they are from another's."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from regraft._version import __version__
from regraft.base import Base, open_base
from regraft.cli import _options as o
from regraft.cli._sink import emit
from regraft.errors import InputError
from regraft.families import family_of_base
from regraft.likeness import Likeness, by_component, compare_fingerprints
from regraft.report.identify_schema import ComparedBase, FingerprintReport, LikenessSummary

# How the keys of an adapter's parts end: none of a base does.
_PART = re.compile(
    r"(^|[._])(lora|hada|lokr|oft|boft|ia3|vera|fourierft|dora|alpha$|on_input$|diff(_b)?$|[ab][12]\.weight$|delta$)",
    re.IGNORECASE,
)

BaseArgument = Annotated[Path, typer.Argument(metavar="BASE", help="A file, index, folder or hub id.")]
Other = Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="A second base: how far is it from the first?")]
Exact = Annotated[bool, typer.Option("--exact", help="Also hash every stored byte: a whole read.")]
WithSketch = Annotated[bool, typer.Option("--sketch", help="With --json, the sketches too (about 170 KB for SDXL).")]


def fingerprint(
    base: BaseArgument,
    other: Other = None,
    exact: Exact = False,
    sketch: WithSketch = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fingerprint a base; with two, say whether they are the same weights, or how far one drifted."""
    first = _opened(base, whole=exact)
    prints = first.exact_prints() if exact else first.prints
    compared, alike = None, dict[str, Likeness]()
    if other is not None:
        second = _opened(other, whole=exact)
        theirs = second.exact_prints() if exact else second.prints
        alike = compare_fingerprints(prints, theirs)
        components = {name: LikenessSummary(**asdict(likeness)) for name, likeness in alike.items()}
        compared = ComparedBase(
            path=str(second.path), family=family_of_base(second), fingerprint=str(theirs), components=components
        )
    report = FingerprintReport(
        regraft_version=__version__,
        path=str(first.path),
        family=family_of_base(first),
        fingerprint=str(prints),
        structure=prints.structure,
        prints=prints.to_json(sketch=sketch),
        brief=prints.brief(),
        other=compared,
        summary=by_component(alike) if compared is not None else str(prints),
    )
    emit(report, json=json, quiet=quiet, table=lambda console: _print(report, first, console))


def _opened(path: Path, *, whole: bool) -> Base:
    """The base at ``path``.

    Raises:
        InputError: it can't be read, or is an adapter.
    """
    base = open_base(path, whole=whole)
    names = [name for tensors in base.components.values() for name in tensors]
    if names and all(_PART.search(name) for name in names):
        what = "is an adapter, and a fingerprint is that of a base"
        remedy = "`regraft inspect` shows an adapter; give the base that it is for here."
        raise InputError(what, file=path, key=names[0], remedy=remedy)
    return base


def _print(report: FingerprintReport, base: Base, console: Console) -> None:
    for told in (report, report.other):
        if told is not None:
            console.print(
                f"{escape(told.path)}  {told.fingerprint}  [dim]{escape(told.family or 'family unknown')}[/]",
                soft_wrap=True,
            )
    if report.other is not None:
        console.print(report.summary, soft_wrap=True)
        return
    for name, part in report.prints["components"].items():
        exact = f"  content {part['content']}" if part["content"] else ""
        console.print(f"  {escape(name)}  {len(base.components[name])} tensors{exact}", soft_wrap=True)
