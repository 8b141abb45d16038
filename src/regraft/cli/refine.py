"""``regraft refine``: a ported adapter brought the rest of the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from regraft.adapter import Adapter
from regraft.base import Base, open_base
from regraft.cli import _bridging as b
from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.errors import UsageError
from regraft.formats import get_format, load_adapter
from regraft.output import check_writable, write_text
from regraft.refine import Look, RefineSettings, Strip
from regraft.refine import refine as refine_adapter
from regraft.refine.bottleneck import is_bottleneck, load_bottlenecks, refine_bottlenecks
from regraft.refine.bridged import check_teacher
from regraft.refine.quantised import Quantize
from regraft.refine.settings import STEPS, Objective, TeacherKind
from regraft.refine.starting import ZERO
from regraft.refine.state import forget, state_file
from regraft.refine.strip import PROMPTS
from regraft.refine.virtual import is_soft_prompt, load_soft_prompt, refine_soft_prompt
from regraft.report.refine_schema import RefineReport
from regraft.report.tables import refine_table


def refine(
    adapter: o.AdapterArgument,
    old: o.From = None,
    new: o.To = None,
    output: o.Output = None,
    start: Annotated[
        Path | None,
        typer.Option("--start", metavar="PORTED|zero", help="To begin from; by default the port that auto makes."),
    ] = None,
    native: Annotated[
        Path | None,
        typer.Option("--native", metavar="FILE", help="An adapter trained on the new base, to show beside the result."),
    ] = None,
    budget: o.Budget = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="Of the training, at most; by default 240, or 480 between bases built differently."
        ),
    ] = None,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate.")] = RefineSettings.rate,
    objective: Annotated[
        str, typer.Option("--objective", metavar="|".join(get_args(Objective)), help="What is matched.")
    ] = "auto",
    teacher: Annotated[
        str,
        typer.Option(
            "--teacher",
            metavar="|".join(get_args(TeacherKind)),
            help="Whose pictures are learnt: the old base's with the adapter, or a bridge's.",
        ),
    ] = RefineSettings.teacher,
    mapper: Annotated[
        Path | None,
        typer.Option(
            "--mapper", metavar="FILE", help="--teacher bridge: of `regraft bridge train`; else delta sampling."
        ),
    ] = None,
    bridge_strength: Annotated[
        str,
        typer.Option("--bridge-strength", metavar="λ|FROM:TO", help="--teacher bridge: `bridge run`'s --strength."),
    ] = "1",
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance", help="Of the pictures that are drawn to learn from; by default each pipeline's own."
        ),
    ] = None,
    bridge_start: Annotated[
        float, typer.Option("--bridge-start", help="--mapper: share of the schedule at which the new base joins.")
    ] = RefineSettings.bridge_start,
    lead: b.Lead = None,
    reading: b.ReadingName = RefineSettings.reading,
    new_prompt: b.NewPrompt = RefineSettings.new_prompt,
    new_guidance: b.NewGuidance = RefineSettings.new_guidance,
    hidden: Annotated[
        float,
        typer.Option(
            "--hidden", metavar="WEIGHT", help="Match the change of hidden states, too; 1 counts it as the outputs."
        ),
    ] = RefineSettings.hidden,
    retention: Annotated[
        float | None,
        typer.Option(
            "--retention",
            help="Share of the steps that keep the new base as it is on inputs of its own; by default 0.25, "
            "or 0 where pictures are learnt (sample).",
        ),
    ] = None,
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
    precision: o.Precision = "no",
    quantize: Annotated[
        str, typer.Option("--quantize", metavar="none|4bit|8bit", help="Of the new base, while its adapter is trained.")
    ] = "none",
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Never hold both bases on the device at once: they take turns.")
    ] = False,
    checkpointing: o.Checkpointing = False,
    optimizer: o.Optimizer = "adamw",
    threads: o.Threads = None,
    resume: o.Resume = False,
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
    joined = b.joining(bridge_start, lead, reading, new_prompt, new_guidance, named="--bridge-start")
    settings = RefineSettings(
        objective=o.one_of(objective, "--objective", get_args(Objective)),
        teacher=o.one_of(teacher, "--teacher", get_args(TeacherKind)),
        mapper=mapper,
        bridge_strength=b.course(bridge_strength, "--bridge-strength"),
        guidance=None if guidance is None else o.at_least_zero(guidance, "--guidance"),
        bridge_start=joined.start,
        lead=joined.lead,
        reading=joined.reading,
        new_prompt=joined.new_prompt,
        new_guidance=joined.new_guidance,
        steps=steps,
        rate=o.above_zero(rate, "--rate"),
        hidden=o.at_least_zero(hidden, "--hidden"),
        retention=None if retention is None else o.share(retention, "--retention"),
        stay=o.share(stay, "--stay"),
        n_inputs=n_inputs,
        prompts=o.texts(prompts),
        filter=_below_one(o.share(filter, "--filter")),
        seed=seed,
        budget=o.seconds(budget),
        rank=rank,
        targets=tuple(targets or ()),
        config=config,
        device=device,
        precision=o.one_of(precision, "--precision", o.PRECISIONS),
        quantize=o.one_of(quantize, "--quantize", get_args(Quantize)),
        low_memory=low_memory,
        checkpointing=checkpointing,
        optimizer=o.one_of(optimizer, "--optimizer", ("adamw", "adamw8bit")),
    )
    check_teacher(settings)
    o.use_hardware(device, "float32", threads)
    run = _Run(
        adapter,
        open_base(o.runnable(old)),
        open_base(o.runnable(new)),
        settings,
        output,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet or json,
    )
    kind = next((kind for kind in _UNPORTED if kind.is_one(adapter)), None)
    if kind is not None:
        if start is not None or format is not None or native is not None:
            what = f"{kind.name} has one format, no port and nothing native beside it"
            raise UsageError(what, remedy="Leave --start, --format and --native out.")
        record = run.without_port(kind)
    else:
        drawn = (PROMPTS if report is not None else 0) if pictures is None else pictures
        record = run.from_port(start, native, format, drawn)
    if report is not None:
        from regraft.report.refine_page import render_refine

        write_text(render_refine(record), report, overwrite=overwrite)
    emit(record, json=json, quiet=quiet, table=lambda console: refine_table(record, console))


@dataclass(frozen=True)
class _Kind:
    """Adapters that change no weights, and so have no port to start from."""

    name: str
    is_one: Callable[[Path], bool]
    load: Callable[[Path], Any]
    refine: Callable[..., Any]


_UNPORTED = (
    _Kind("a soft prompt", is_soft_prompt, load_soft_prompt, refine_soft_prompt),
    _Kind("a bottleneck adapter", is_bottleneck, load_bottlenecks, refine_bottlenecks),
)


@dataclass(frozen=True)
class _Run:
    """What every kind of adapter is refined with."""

    path: Path
    old: Base
    new: Base
    settings: RefineSettings
    output: Path
    resume: bool
    overwrite: bool
    quiet: bool

    def from_port(self, start: Path | None, native: Path | None, format: str | None, pictures: int) -> RefineReport:
        """Refine updates of weights, and write them."""
        trained = load_adapter(self.path, names=o.names_of(self.old), base_config=o.config_of(self.old))
        ported = _start(start, self.new)
        known = None if native is None else _on(native, self.new)
        state = self._state(trained, ported)
        with progress("Refining", quiet=self.quiet) as tick:
            heard, done = _teller(tick, self.settings)
            strip = Strip(pictures, self.settings.prompts, self.settings.seed, lambda what: tick(*done(), what))
            result = refine_adapter(
                trained,
                self.old,
                self.new,
                start=ported,
                settings=self.settings,
                state=state,
                tick=tick,
                heard=heard,
                strip=strip,
                native=known,
            )
            written = result.save(self.output, format=format, overwrite=self.overwrite)
        forget(state)
        return _with_outputs(result.report, written)

    def without_port(self, kind: _Kind) -> RefineReport:
        """Refine one of another kind, and write it."""
        trained = kind.load(self.path)
        state = self._state(trained.digest, None)
        with progress("Refining", quiet=self.quiet) as tick:
            heard, _ = _teller(tick, self.settings)
            asked = {"settings": self.settings, "state": state, "heard": heard, "tick": tick}
            result = kind.refine(trained, self.old, self.new, **asked)
            written = result.save(self.output, overwrite=self.overwrite)
        forget(state)
        return _with_outputs(result.report, written)

    def _state(self, trained: Adapter | str, ported: Adapter | str | None) -> Path:
        state = state_file(trained, self.old, self.new, ported, self.settings)
        if not self.resume:
            forget(state)
        return state


def _teller(
    tick: Callable[[int, int, str], None], settings: RefineSettings
) -> tuple[Callable[[Look], None], Callable[[], tuple[int, int]]]:
    """What tells of looks; and at which step of how many the last one was."""
    steps = [(0, settings.steps or STEPS)]

    def heard(look: Look) -> None:
        steps.append((look.step, look.most))
        tick(look.step, look.most, told(look, settings))

    return heard, lambda: steps[-1]


def told(look: Look, settings: RefineSettings) -> str:
    """A look as the progress line has it; the time left is that of all steps, or of the budget if that is less."""
    said = f"{look.recovered:.1%} of what is wanted, on held-out inputs"
    if look.learnt is None:
        return said
    left = look.seconds / look.step * (look.most - look.step)
    if settings.budget is not None:
        left = min(left, settings.budget - look.seconds)
    return f"loss {look.learnt:.3f}; {said}; at most {_time(max(0.0, left))} left"


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _with_outputs(report: RefineReport, written: Sequence[Path]) -> RefineReport:
    return report.model_copy(update={"outputs": [str(file) for file in written]})


def _below_one(share: float) -> float:
    if share >= 1:
        raise UsageError("--filter 1 leaves no samples", remedy="Give a share below 1.")
    return share


def _start(start: Path | None, new: Base) -> Adapter | Literal["zero"] | None:
    if start is None:
        return None
    # A file of that name is still to be had, by its whole path.
    return ZERO if str(start) == ZERO else _on(start, new)


def _on(file: Path, base: Base) -> Adapter:
    return load_adapter(file, names=o.names_of(base), base_config=o.config_of(base))
