"""``regraft extract``: an adapter out of two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.ops.extract import Settings, extract_adapter
from regraft.report.ops_tables import extract_table


def extract(
    base: Annotated[Path, typer.Option("--base", metavar="OLD", help="The checkpoint before: file, index or folder.")],
    tuned: Annotated[Path, typer.Option("--tuned", metavar="NEW", help="The checkpoint that was trained from it.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="File or folder to write.")],
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="The most that a module may have.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Share of each module's ‖ΔW‖² to keep.")] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="By default peft for one model alone, kohya for a pipeline.")
    ] = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    components: o.Components = None,
    save_dtype: Annotated[str | None, typer.Option("--save-dtype", help="Of the output; by default float32.")] = None,
    device: o.Device = "cpu",
    threads: o.Threads = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a LoRA of what a fine-tune changed: the difference of two checkpoints, cut to a rank."""
    o.use_hardware(device, "float32", threads)
    with progress("Extracting", quiet=quiet or json) as tick:
        report = extract_adapter(
            base,
            tuned,
            output,
            Settings(rank, energy, o.selection(include, exclude, components), device),
            format=format,
            save_dtype=o.dtype(save_dtype, "--save-dtype") if save_dtype is not None else None,
            overwrite=overwrite,
            tick=tick,
        )
    emit(report, json=json, quiet=quiet, table=lambda console: extract_table(report, console))
