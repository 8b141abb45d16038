"""Where output goes: records to stdout as JSON or tables, progress and errors to stderr."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import indent
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment

from regraft.errors import printable

if TYPE_CHECKING:
    # It builds its models when it is loaded, which `--help` need not wait for.
    from regraft.report.schema import Record


class _Console(Console):
    """A console on which keys and metadata of a stranger's file are shown, and never obeyed by the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text, keep="\n\t"), segment.style)


out = _Console(highlight=False, soft_wrap=False)
err = _Console(stderr=True, highlight=False)

#: Called with (steps done, steps in all, what is at work now).
Ticker = Callable[[int, int, str], None]


def prepare_terminal() -> None:
    """Let every stream take our characters.

    An old Windows code page replaces on a terminal what it lacks, instead of failing; a pipe or file gets UTF-8 (JSON's
    encoding), unless the user asked Python for another one.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty() and "PYTHONIOENCODING" not in os.environ:
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")


def fail(line: str, code: int) -> NoReturn:
    """One line on stderr, then exit."""
    err.print(f"[bold red]regraft:[/] {escape(line)}", soft_wrap=True)
    sys.exit(code)


def _escaped(json: str) -> str:
    # JSON escapes what lies below the space; C1's controls and marks of direction it leaves to its writer.
    return re.sub("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", lambda c: f"\\u{ord(c[0]):04x}", json)


def emit(record: Record, *, json: bool, quiet: bool, table: Callable[[Console], None]) -> None:
    """Print a record: as JSON, not at all, or as the table that ``table`` draws."""
    if json:
        sys.stdout.write(_escaped(record.to_json()) + "\n")
    elif not quiet:
        table(out)


def emit_list(records: Sequence[Record]) -> None:
    """Print several records as one JSON document."""
    listed = ",\n".join(indent(record.to_json(), "  ") for record in records)
    sys.stdout.write(_escaped(f"[\n{listed}\n]") + "\n")


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Ticker]:
    """A bar that shows itself once the work has taken 2 s; none when stderr is no terminal."""
    if quiet or not err.is_terminal or os.environ.get("TERM") == "dumb":
        yield lambda done, total, what: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(title, total=None, what="", visible=False)

        def tick(done: int, total: int, what: str) -> None:
            elapsed = bar.tasks[task].elapsed or 0.0
            bar.update(task, completed=done, total=total, what=escape(what), visible=elapsed > 2.0)

        yield tick
