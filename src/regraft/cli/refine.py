"""``regraft refine``: a ported adapter brought the rest of the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from regraft.adapter import Adapter
from regraft.base import Base, open_base
from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.errors import UsageError
from regraft.formats import get_format, load_adapter
from regraft.output import check_writable, write_text
from regraft.refine import Look, RefineSettings, Strip
from regraft.refine import refine as refine_adapter
from regraft.refine.quantised import Quantize
from regraft.refine.settings import Objective
from regraft.refine.starting import ZERO
from regraft.refine.state import forget, state_file
from regraft.refine.strip import PROMPTS
from regraft.refine.virtual import is_soft_prompt, load_soft_prompt, refine_soft_prompt
from regraft.report.refine_schema import RefineReport
from regraft.report.tables import refine_table

_UNITS = {"s": 1, "m": 60, "h": 3600}


def refine(
    adapter: o.AdapterArgument,
    old: o.From = None,
    new: o.To = None,
    output: o.Output = None,
    start: Annotated[
        Path | None,
        typer.Option("--start", metavar="PORTED|zero", help="To begin from; by default the port that auto makes."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="10m", help="Time for the training: seconds, 10m or 2h.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the training, at most.")] = RefineSettings.steps,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate.")] = RefineSettings.rate,
    objective: Annotated[
        str, typer.Option("--objective", metavar="|".join(get_args(Objective)), help="What is matched.")
    ] = "auto",
    hidden: Annotated[
        float,
        typer.Option(
            "--hidden", metavar="WEIGHT", help="Match the change of hidden states, too; 1 counts it as the outputs."
        ),
    ] = RefineSettings.hidden,
    retention: Annotated[
        float,
        typer.Option("--retention", help="Share of the steps that keep the new base as it is on inputs of its own."),
    ] = RefineSettings.retention,
    stay: Annotated[
        float, typer.Option("--stay", help="How far it stays itself there: 0 with the adapter's effect, 1 without.")
    ] = RefineSettings.stay,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of the result; by default the start's.")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option("--targets", metavar="GLOB", help="Further modules of the new base to train; repeatable."),
    ] = None,
    n_inputs: Annotated[int | None, typer.Option("--n-inputs", min=8, help="Inputs that the old base makes.")] = None,
    prompts: o.Prompts = None,
    filter: Annotated[
        float,
        typer.Option("--filter", help="Share of the samples left out, where the adapter matters least (sample)."),
    ] = RefineSettings.filter,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of inputs and order.")] = 0,
    config: o.Config = None,
    device: o.Device = "cpu",
    precision: Annotated[str, typer.Option("--precision", metavar="no|fp16|bf16", help="Of the student's passes.")] = (
        "no"
    ),
    quantize: Annotated[
        str, typer.Option("--quantize", metavar="none|4bit|8bit", help="Of the new base, while its adapter is trained.")
    ] = "none",
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Never hold both bases on the device at once: they take turns.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Save memory by computing activations twice.")
    ] = False,
    optimizer: Annotated[str, typer.Option("--optimizer", metavar="adamw|adamw8bit")] = "adamw",
    threads: o.Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was stopped.")] = False,
    format: Annotated[str | None, typer.Option("--format", help="Of the output; by default the input's.")] = None,
    report: o.Report = None,
    pictures: Annotated[
        int | None,
        typer.Option(
            "--pictures",
            metavar="N",
            min=0,
            help="Prompts to draw over the training, with pipelines; by default 4 with --report, else 0.",
        ),
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Bring a port the rest of the way: a short distillation on inputs that the old base makes. No data needed."""
    if old is None or new is None:
        raise UsageError("--from and --to are both needed: both bases are run")
    if output is None:
        raise UsageError("--output is missing", remedy="Give the refined file's name with -o.")
    for path in (output, report):
        if path is not None:
            check_writable(path, overwrite=overwrite, source=adapter)
    if format is not None:
        get_format(format)
    settings = RefineSettings(
        objective=o.one_of(objective, "--objective", get_args(Objective)),
        steps=steps,
        rate=o.above_zero(rate, "--rate"),
        hidden=o.at_least_zero(hidden, "--hidden"),
        retention=o.share(retention, "--retention"),
        stay=o.share(stay, "--stay"),
        n_inputs=n_inputs,
        prompts=o.texts(prompts),
        filter=_below_one(o.share(filter, "--filter")),
        seed=seed,
        budget=seconds(budget),
        rank=rank,
        targets=tuple(targets or ()),
        config=config,
        device=device,
        precision=o.one_of(precision, "--precision", ("no", "fp16", "bf16")),
        quantize=o.one_of(quantize, "--quantize", get_args(Quantize)),
        low_memory=low_memory,
        checkpointing=checkpointing,
        optimizer=o.one_of(optimizer, "--optimizer", ("adamw", "adamw8bit")),
    )
    o.use_hardware(device, "float32", threads)
    old_base, new_base = open_base(o.runnable(old)), open_base(o.runnable(new))
    if is_soft_prompt(adapter):
        if start is not None or format is not None:
            raise UsageError("a soft prompt has one format and no port", remedy="Leave --start and --format out.")
        prompt = load_soft_prompt(adapter)
        state = state_file(prompt.digest, old_base, new_base, None, settings)
        if not resume:
            forget(state)
        with progress("Refining", quiet=quiet or json) as tick:
            refined = refine_soft_prompt(
                prompt, old_base, new_base, settings=settings, state=state, heard=_teller(tick, settings)[0]
            )
            saved = refined.save(output, overwrite=overwrite)
        forget(state)
        _told(refined.report, saved, report, overwrite=overwrite, json=json, quiet=quiet)
        return
    trained = load_adapter(adapter, names=o.names_of(old_base), base_config=o.config_of(old_base))
    ported = _start(start, new_base)
    state = state_file(trained, old_base, new_base, ported, settings)
    if not resume:
        forget(state)
    with progress("Refining", quiet=quiet or json) as tick:
        heard, done = _teller(tick, settings)
        strip = Strip(
            (PROMPTS if report is not None else 0) if pictures is None else pictures,
            settings.prompts,
            seed,
            lambda what: tick(done(), settings.steps, what),
        )
        result = refine_adapter(
            trained,
            old_base,
            new_base,
            start=ported,
            settings=settings,
            state=state,
            tick=tick,
            heard=heard,
            strip=strip,
        )
        written = result.save(output, format=format, overwrite=overwrite)
    forget(state)
    _told(result.report, written, report, overwrite=overwrite, json=json, quiet=quiet)


def _teller(
    tick: Callable[[int, int, str], None], settings: RefineSettings
) -> tuple[Callable[[Look], None], Callable[[], int]]:
    """What tells of looks, and at which step the last one was."""
    steps = [0]

    def heard(look: Look) -> None:
        steps.append(look.step)
        tick(look.step, settings.steps, f"{look.recovered:.1%} of what is wanted, on held-out inputs")

    return heard, lambda: steps[-1]


def _told(
    found: RefineReport, written: Sequence[Path], report: Path | None, *, overwrite: bool, json: bool, quiet: bool
) -> None:
    record = found.model_copy(update={"outputs": [str(file) for file in written]})
    if report is not None:
        from regraft.report.refine_page import render_refine

        write_text(render_refine(record), report, overwrite=overwrite)
    emit(record, json=json, quiet=quiet, table=lambda console: refine_table(record, console))


def _below_one(share: float) -> float:
    if share >= 1:
        raise UsageError("--filter 1 leaves no samples", remedy="Give a share below 1.")
    return share


def _start(start: Path | None, new: Base) -> Adapter | Literal["zero"] | None:
    if start is None:
        return None
    # A file of that name is still to be had, by its whole path.
    return ZERO if str(start) == ZERO else load_adapter(start, names=o.names_of(new), base_config=o.config_of(new))


def seconds(text: str | None) -> float | None:
    """``90`` → 90; ``10m`` → 600; ``2h`` → 7200.

    Raises:
        UsageError: it is neither.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--budget {text!r} is no time", remedy="Give seconds, 10m or 2h.")
    return float(found[1]) * _UNITS[found[2] or "s"]
