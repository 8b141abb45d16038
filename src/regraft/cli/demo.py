from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.errors import OutputError
from regraft.output import write_text
from regraft.report.demo_schema import DemoReport


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where to write.")] = Path(
        "regraft-demo"
    ),
    threads: o.Threads = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """The main job on the embedded bases; ends with a report in pictures."""
    from regraft.demo import run_demo
    from regraft.report.html import render_demo

    page = output / "report.html"
    if page.exists() and not overwrite:
        raise OutputError("exists already", file=page, remedy="Choose another folder with -o, or pass --overwrite.")
    try:
        output.mkdir(exist_ok=True)
    except OSError:
        raise OutputError("can't make this folder", file=output) from None
    o.use_hardware("cpu", "float32", threads)
    with progress("Demo", quiet=quiet) as tick:
        record = run_demo(output, tick)
    write_text(render_demo(record), page, overwrite=overwrite)
    emit(record, json=json, quiet=quiet, table=lambda console: _table(record, page, console))


def _table(record: DemoReport, page: Path, console: Console) -> None:
    near = record.near
    console.print(f"[bold]{near.label}[/]  {near.check.verdict}: {near.port.summary}")
    if near.verify is not None:
        console.print(f"         {near.verify.summary}")
    for refusal in record.refusals:
        console.print(f"[bold]{refusal.label}[/]  {refusal.check.summary}")
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("pictures of")
    table.add_column("style share", justify="right")
    for picture in record.columns:
        table.add_row(picture.title, f"{picture.figures['style_share']:.2f}")
    console.print()
    console.print(table)
    console.print()
    console.print(f"Ported LoRA: {near.port.outputs[0]}", markup=False)
    console.print(f"Report:      {page}  ({record.seconds:.0f} s, {record.peak_mb:.0f} MB)", markup=False)
