"""``regraft bridge``: the old base kept beside the new one, where no map of weights carries an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from regraft.base import open_base
from regraft.bridge.run import BridgeSettings, run_bridge
from regraft.bridge.x_adapter.mapper import Fusion
from regraft.bridge.x_adapter.settings import Joining, MapperSettings
from regraft.bridge.x_adapter.training import state_file, train_mapper
from regraft.cli import _bridging as b
from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.cli.train import told
from regraft.errors import UsageError
from regraft.formats import load_adapter
from regraft.output import check_writable
from regraft.report.bridge_table import bridge_table, bridge_train_table

app = typer.Typer(
    help="Keep the old base beside the new one, and add what the adapter does to it.", no_args_is_help=True
)


@app.callback()
def _bridge() -> None:
    pass


@app.command()
def run(
    adapter: Annotated[
        Path | None,
        typer.Argument(metavar="ADAPTER", help="For the old base: a file, a PEFT folder, or its hub id."),
    ] = None,
    lora: Annotated[Path | None, typer.Option("--lora", metavar="FILE", help="ADAPTER, as an option.")] = None,
    old: o.From = None,
    new: o.To = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to run; repeatable.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Of pictures a PNG, new alone | bridged; of texts a file."),
    ] = None,
    strength: b.CourseText = "1",
    mix: Annotated[
        float | None,
        typer.Option(
            "--mix",
            metavar="P",
            help="Of texts: weigh each base by how it foretells the text; P is the adapter's part at first.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of noise and draws.")] = BridgeSettings.seed,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the sampler of pictures.")] = BridgeSettings.steps,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Of both bases; by default each pipeline's own.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", metavar="TEXT", help="What guidance leads away from.")
    ] = None,
    height: Annotated[int | None, typer.Option("--height", min=8, help="Of pictures; by default as NEW draws.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=8, help="Likewise.")] = None,
    tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of a text.")] = BridgeSettings.tokens,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of texts; 0 takes the likeliest token.")
    ] = BridgeSettings.temperature,
    mapper: Annotated[
        Path | None,
        typer.Option("--mapper", metavar="FILE", help="Of `regraft bridge train`; without one, delta sampling."),
    ] = None,
    start: Annotated[
        float, typer.Option("--start", help="--mapper: share of the schedule at which the new base joins.")
    ] = Joining.start,
    lead: b.Lead = None,
    reading: b.ReadingName = Joining.reading,
    new_prompt: b.NewPrompt = Joining.new_prompt,
    new_guidance: b.NewGuidance = Joining.new_guidance,
    controlnet: Annotated[
        Path | None, typer.Option("--controlnet", metavar="FOLDER", help="A ControlNet for the old base.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--control-image", metavar="FILE", help="What the ControlNet is shown.")
    ] = None,
    control_scale: Annotated[
        float, typer.Option("--control-scale", help="Of what the ControlNet adds.")
    ] = BridgeSettings.control_scale,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="--mapper: never hold both bases on the device at once.")
    ] = False,
    config: o.Config = None,
    device: o.Device = "cpu",
    dtype: b.HeldDtype = BridgeSettings.dtype,
    threads: o.Threads = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Run prompts through the new base alone, and with the adapter on the old base beside it."""
    if old is None or new is None:
        raise UsageError("--from and --to are both needed: a bridge runs the old base beside the new one")
    if adapter is not None and lora is not None:
        raise UsageError("an adapter is named twice", remedy="Leave --lora out.")
    adapter = lora if adapter is None else adapter
    if not prompts:
        raise UsageError("--prompt is missing", remedy="Give at least one.")
    if output is not None:
        check_writable(output, overwrite=overwrite)
    joined = b.joining(start, lead, reading, new_prompt, new_guidance)
    theirs = [*joined.asked, *(["low_memory"] if low_memory else [])]
    if mapper is None and theirs:
        raise UsageError(f"--{theirs[0].replace('_', '-')} is a mapper's", remedy="Give --mapper with it.")
    settings = BridgeSettings(
        strength=b.course(strength),
        mix=mix,
        seed=seed,
        steps=steps,
        guidance=None if guidance is None else o.at_least_zero(guidance, "--guidance"),
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        tokens=tokens,
        temperature=o.at_least_zero(temperature, "--temperature"),
        config=config,
        device=device,
        dtype=o.one_of(dtype, "--dtype", o.BASE_DTYPES),
        mapper=mapper,
        joining=joined,
        controlnet=controlnet,
        image=image,
        control_scale=o.finite(control_scale, "--control-scale"),
        low_memory=low_memory,
    )
    o.use_hardware(device, "float32", threads)
    first, second = (open_base(o.runnable(path)) for path in (old, new))
    read = None
    if adapter is not None:
        read = load_adapter(adapter, names=o.names_of(first), base_config=o.config_of(first))
    with progress("Running", quiet=quiet or json) as tick:
        record = run_bridge(read, first, second, prompts, output, settings, overwrite=overwrite, tick=tick)
    emit(record, json=json, quiet=quiet, table=lambda console: bridge_table(record, console))


@app.command()
def train(
    old: o.From = None,
    new: o.To = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FOLDER", help="Pictures with captions to learn from.")
    ] = None,
    own: Annotated[bool, typer.Option("--self", help="Learn from pictures that the two bases draw.")] = False,
    output: o.Output = None,
    pictures: Annotated[
        int, typer.Option("--pictures", min=2, help="--self: how many, half by each base.")
    ] = MapperSettings.pictures,
    prompts: o.Prompts = None,
    varied: Annotated[
        int, typer.Option("--varied", min=0, help="Further versions of each picture, in other colours.")
    ] = MapperSettings.varied,
    levels: Annotated[
        list[str] | None,
        typer.Option(
            "--levels",
            metavar="N|OLD=NEW",
            help="How many of the old decoder's last blocks speak, or a block of it and one of the new base's; "
            "repeatable.",
        ),
    ] = None,
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Residual blocks of a level.")] = MapperSettings.blocks,
    fusion: Annotated[
        str, typer.Option("--fusion", metavar="add|guided|spade", help="How a level joins the new base.")
    ] = MapperSettings.fusion,
    timed: Annotated[bool, typer.Option("--timed/--untimed", help="Tell the mapper noise levels.")] = True,
    lead: Annotated[
        float, typer.Option("--lead", help="Least share of the new base's noise that the old one sees.")
    ] = MapperSettings.lead,
    prompted: Annotated[
        float, typer.Option("--prompted", help="Share of the pictures whose caption the new base is given.")
    ] = MapperSettings.prompted,
    steps: Annotated[int, typer.Option("--steps", min=1)] = MapperSettings.steps,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures in a step.")] = MapperSettings.batch,
    rate: Annotated[float | None, typer.Option("--rate", help="Learning rate; by default by the channels.")] = None,
    held: Annotated[
        float, typer.Option("--held-out", help="Share of the pictures that is only measured on.")
    ] = MapperSettings.held,
    size: Annotated[
        int | None, typer.Option("--size", min=8, help="--data: of the new base's pictures; by default as it draws.")
    ] = None,
    caption: Annotated[
        str | None, typer.Option("--caption", metavar="TEXT", help="--data: of pictures that have none.")
    ] = None,
    strip: Annotated[
        Path | None,
        typer.Option("--strip", metavar="PNG", help="Draw a few prompts through the bridge over the training."),
    ] = None,
    budget: o.Budget = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of first values, pictures, order and noise.")] = 0,
    config: o.Config = None,
    device: o.Device = "cpu",
    dtype: b.HeldDtype = MapperSettings.dtype,
    precision: o.Precision = "no",
    checkpointing: o.Checkpointing = False,
    optimizer: o.Optimizer = "adamw",
    threads: o.Threads = None,
    resume: o.Resume = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Train the mapper of an X-Adapter: once for a pair of bases, then any plug-in of the old one works."""
    if old is None or new is None:
        raise UsageError("--from and --to are both needed: a mapper belongs to a pair")
    if (data is None) != own:
        raise UsageError("either --data or --self is needed", remedy="--self takes pictures that the two bases draw.")
    if data is not None and prompts is not None:
        raise UsageError("--prompts are for pictures that the bases draw", remedy="Leave it out with --data.")
    if output is None:
        raise UsageError("--output is missing", remedy="Name the mapper's .safetensors file with -o.")
    if output.suffix != ".safetensors":
        raise UsageError(f"-o {output} is no .safetensors file", remedy="A mapper is one such file.")
    check_writable(output, overwrite=overwrite)
    settings = MapperSettings(
        levels=wanted_levels(levels),
        blocks=blocks,
        fusion=o.one_of(fusion, "--fusion", get_args(Fusion)),
        timed=timed,
        pictures=pictures,
        prompts=o.texts(prompts),
        varied=varied,
        lead=o.share(lead, "--lead"),
        prompted=o.share(prompted, "--prompted"),
        steps=steps,
        batch=batch,
        rate=None if rate is None else o.above_zero(rate, "--rate"),
        held=o.share(held, "--held-out"),
        size=size,
        caption=caption,
        seed=seed,
        budget=o.seconds(budget),
        config=config,
        device=device,
        dtype=o.one_of(dtype, "--dtype", o.BASE_DTYPES),
        precision=o.one_of(precision, "--precision", o.PRECISIONS),
        checkpointing=checkpointing,
        optimizer=o.one_of(optimizer, "--optimizer", ("adamw", "adamw8bit")),
    )
    o.use_hardware(device, "float32", threads)
    first, second = (open_base(o.runnable(path)) for path in (old, new))
    state = state_file(first, second, data, settings)
    if not resume:
        state.unlink(missing_ok=True)
        state.with_suffix(".pictures.pt").unlink(missing_ok=True)
    with progress("Training", quiet=quiet or json) as tick:
        record = train_mapper(
            first,
            second,
            output,
            data,
            settings,
            overwrite=overwrite,
            state=state,
            tick=tick,
            heard=lambda look: tick(look.step, settings.steps, told(look)),
            strip=strip,
        )
    emit(record, json=json, quiet=quiet, table=lambda console: bridge_train_table(record, console))


def wanted_levels(given: list[str] | None) -> int | tuple[tuple[str, str], ...] | None:
    """``["3"]`` → 3; ``["up_blocks.1=mid_block", …]`` → the pairs; nothing → None.

    Raises:
        UsageError: one is neither.
    """
    if not given:
        return None
    if len(given) == 1 and given[0].isdecimal():
        return int(given[0])
    pairs = [tuple(part.strip() for part in text.split("=")) for text in given]
    for text, pair in zip(given, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise UsageError(
                f"--levels {text!r} is neither a number nor OLD=NEW", remedy="As in up_blocks.1=mid_block."
            )
    return tuple((pair[0], pair[1]) for pair in pairs)
