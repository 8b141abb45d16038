"""``regraft bridge``: the old base kept beside the new one, where no map of weights carries an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.base import open_base
from regraft.bridge.run import BridgeSettings, run_bridge
from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.errors import UsageError
from regraft.formats import load_adapter
from regraft.output import check_writable
from regraft.report.bridge_table import bridge_table

app = typer.Typer(
    help="Keep the old base beside the new one, and add what the adapter does to it.", no_args_is_help=True
)


@app.callback()
def _bridge() -> None:
    pass


@app.command()
def run(
    adapter: o.AdapterArgument,
    old: o.From = None,
    new: o.To = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to run; repeatable.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Of pictures a PNG, new alone | bridged; of texts a file."),
    ] = None,
    strength: Annotated[
        float, typer.Option("--strength", help="Factor of what the adapter changes.")
    ] = BridgeSettings.strength,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of noise and draws.")] = BridgeSettings.seed,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the sampler of pictures.")] = BridgeSettings.steps,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Of both bases; by default each pipeline's own.")
    ] = None,
    tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of a text.")] = BridgeSettings.tokens,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of texts; 0 takes the likeliest token.")
    ] = BridgeSettings.temperature,
    config: o.Config = None,
    device: o.Device = "cpu",
    threads: o.Threads = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Run prompts through the new base alone, and with the adapter on the old base beside it."""
    if old is None or new is None:
        raise UsageError("--from and --to are both needed: a bridge runs the old base beside the new one")
    if not prompts:
        raise UsageError("--prompt is missing", remedy="Give at least one.")
    if output is not None:
        check_writable(output, overwrite=overwrite)
    settings = BridgeSettings(
        strength=o.finite(strength, "--strength"),
        seed=seed,
        steps=steps,
        guidance=None if guidance is None else o.at_least_zero(guidance, "--guidance"),
        tokens=tokens,
        temperature=o.at_least_zero(temperature, "--temperature"),
        config=config,
        device=device,
    )
    o.use_hardware(device, "float32", threads)
    first, second = (open_base(o.runnable(path)) for path in (old, new))
    read = load_adapter(adapter, names=o.names_of(first), base_config=o.config_of(first))
    with progress("Running", quiet=quiet or json) as tick:
        record = run_bridge(read, first, second, prompts, output, settings, overwrite=overwrite, tick=tick)
    emit(record, json=json, quiet=quiet, table=lambda console: bridge_table(record, console))
