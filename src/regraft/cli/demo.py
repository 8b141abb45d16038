from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
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
    refine: Annotated[
        bool,
        typer.Option("--refine", help="Also distil the LoRA into the bases that a port is refused for: minutes more."),
    ] = False,
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
        record = run_demo(output, tick, refine=refine)
    write_text(render_demo(record), page, overwrite=overwrite)
    emit(record, json=json, quiet=quiet, table=lambda console: _table(record, page, console))


def _table(record: DemoReport, page: Path, console: Console) -> None:
    near = record.near
    console.print(f"[bold]{near.label}[/]  {near.check.verdict}: {near.port.summary}")
    if near.verify is not None:
        console.print(f"         {near.verify.summary}")
    for refusal in record.refusals:
        console.print(f"[bold]{refusal.label}[/]  {refusal.check.summary}")
    for far in record.refined:
        said = far.refine.summary if far.refine is not None else f"not possible yet: {far.reason}"
        console.print(f"[bold]{far.label}, refined[/]  {escape(said)}")
    console.print()
    console.print(_sheet(record))
    console.print()
    console.print(f"Ported LoRA: {near.port.outputs[0]}", markup=False)
    for far in record.refined:
        if far.refine is not None:
            console.print(f"Refined LoRA: {far.refine.outputs[0]}", markup=False)
    console.print(f"Report:      {page}  ({record.seconds:.0f} s, {record.peak_mb:.0f} MB)", markup=False)


def _sheet(record: DemoReport) -> Table:
    """The columns of the contact sheet as rows; with refined ones, what each of those cost."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("pictures of")
    costs = {far.title: far for far in record.refined}
    for name in ("style share", *(("seconds", "self-made pictures", "steps") if costs else ())):
        table.add_column(name, justify="right")
    for picture in record.columns:
        cells, far = [f"{picture.figures['style_share']:.2f}"], costs.get(picture.title)
        if far is not None and far.refine is not None:
            cells += [f"{far.refine.seconds:.0f}", str(far.self_made), str(far.refine.steps)]
        table.add_row(picture.title, *cells)
    return table
