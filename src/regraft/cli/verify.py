from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.base import open_base
from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.errors import UsageError
from regraft.formats import load_adapter
from regraft.output import check_writable, write_text
from regraft.probes import read_prompts
from regraft.report.tables import verify_table
from regraft.verify import verify as verify_adapters

#: Rows of a page's contact sheet.
PICTURES = 4


def verify(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The adapter as it was trained on OLD.")],
    ported: Annotated[Path, typer.Argument(metavar="PORTED", help="The adapter for NEW.")],
    old: o.From = None,
    new: o.To = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Inputs: one per line, UTF-8.")
    ] = None,
    n_inputs: Annotated[
        int | None,
        typer.Option("--n-inputs", min=1, help="By default 32 texts, 16 for pictures, or all given."),
    ] = None,
    pictures: Annotated[
        int | None,
        typer.Option(
            "--pictures",
            metavar="N",
            min=0,
            help="Prompts to draw, with pipelines; by default 4 with --report, else 0.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of inputs, pictures, random control, intervals.")] = 0,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="JSON|FOLDER", help="Of a bare weights file.")
    ] = None,
    device: o.Device = "cpu",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="What the models run in. In float16 or bfloat16 small updates can round away when they are merged.",
        ),
    ] = "float32",
    threads: o.Threads = None,
    report: o.Report = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Did it survive? Both bases with and without their adapter on the same inputs, beside controls."""
    if old is None or new is None:
        raise UsageError("--from and --to are both needed: each adapter is run on its own base")
    if report is not None:
        check_writable(report, overwrite=overwrite)
    o.use_hardware(device, "float32", threads)
    old, new = o.runnable(old), o.runnable(new)
    texts = read_prompts(prompts) if prompts is not None else None
    trained, carried = (
        load_adapter(path, names=o.names_of(opened), base_config=o.config_of(opened))
        for path, opened in ((original, open_base(old)), (ported, open_base(new)))
    )
    with progress("Verifying", quiet=quiet) as tick:
        record = verify_adapters(
            trained,
            carried,
            old,
            new,
            prompts=texts,
            n_inputs=n_inputs,
            pictures=(PICTURES if report is not None else 0) if pictures is None else pictures,
            seed=seed,
            config=config,
            device=device,
            dtype=str(o.dtype(dtype)).removeprefix("torch."),
            tick=tick,
        )
    if report is not None:
        from regraft.report.html import render_verify

        write_text(render_verify(record), report, overwrite=overwrite)
    emit(record, json=json, quiet=quiet, table=lambda console: verify_table(record, console))
