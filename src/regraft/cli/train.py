"""``regraft train``: an adapter that says from the first day what it belongs to."""

from __future__ import annotations

import json as json_
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from regraft.base import open_base
from regraft.cli import _options as o
from regraft.cli._sink import emit, progress
from regraft.errors import UsageError
from regraft.formats import get_format
from regraft.output import check_writable
from regraft.refine.quantised import Quantize
from regraft.report.tables import train_table
from regraft.training import KINDS, Look, TrainSettings, state_file
from regraft.training import train as train_adapter
from regraft.training.kinds import rates
from regraft.training.settings import SubjectFolder, SubjectSettings

# What torch's generators take, with room for what is added to it.
_LARGEST_SEED = 1 << 48


def train(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA", help="A folder of pictures with captions; .txt or .jsonl files, or a folder of them."
        ),
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="BASE", help="To train on: a pipeline or transformers folder.")
    ] = None,
    output: o.Output = None,
    kind: Annotated[str, typer.Option("--kind", metavar="|".join(KINDS), help="Of adapter.")] = TrainSettings.kind,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="By default the kind's.")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Of the scale alpha / rank; by default the rank.")] = (
        None
    ),
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            metavar="NAME",
            help="Modules by the ends of their names, or all-linear; repeatable. By default the denoiser's transformer "
            "blocks, or every linear layer of a language model.",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of PEFT's config of the kind; repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1)] = TrainSettings.steps,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Texts (8) or pictures (4 by default) in a step.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help=f"Learning rate; by default the kind's: {rates()}.")
    ] = None,
    held: Annotated[
        float | None,
        typer.Option(
            "--held-out", help=f"Share of the data that is only measured on; {TrainSettings.held} by default."
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", min=8, help="Of the pictures; by default what the pipeline draws.")
    ] = None,
    caption: Annotated[
        str | None, typer.Option("--caption", metavar="TEXT", help="Of pictures that have none.")
    ] = None,
    dropped: Annotated[
        float, typer.Option("--caption-dropout", help="Share of the pictures that are shown without a caption.")
    ] = TrainSettings.dropped,
    context: Annotated[int, typer.Option("--context", min=8, help="Tokens of a text at most.")] = TrainSettings.context,
    subject: Annotated[
        list[str] | None,
        typer.Option(
            "--subject",
            metavar="FOLDER=TOKEN NOUN",
            help="In place of DATA: a folder of pictures of one subject, its special token and its class, as in "
            "'mine=<v1> cat'; repeatable.",
        ),
    ] = None,
    cut_mix: Annotated[
        float | None,
        typer.Option(
            "--cut-mix",
            help=f"Share of the samples that are collages of two subjects; {SubjectSettings.cut_mix} by default.",
        ),
    ] = None,
    unmix: Annotated[
        float | None,
        typer.Option(
            "--unmix", min=0, help="Weight of keeping each subject's token out of the other's half; 0 by default."
        ),
    ] = None,
    prior: Annotated[
        int | None,
        typer.Option(
            "--prior", min=0, help="Pictures of each class that the base draws, to keep knowing it; 0 by default."
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option("--fit", metavar="crop|whole", help="Of a picture into half a collage; crop by default."),
    ] = None,
    phrase: Annotated[
        list[str] | None,
        typer.Option("--phrase", metavar="NAME=TEXT", help="Prompt for subjects: one, both, beside or above."),
    ] = None,
    budget: o.Budget = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=_LARGEST_SEED, help="Of first values, order and noise.")
    ] = 0,
    config: o.Config = None,
    device: o.Device = "cpu",
    dtype: o.BaseDtype = "float32",
    precision: o.Precision = "no",
    quantize: Annotated[
        str, typer.Option("--quantize", metavar="none|4bit|8bit", help="Of the base while it is trained on (QLoRA).")
    ] = "none",
    checkpointing: o.Checkpointing = False,
    optimizer: o.Optimizer = "adamw",
    threads: o.Threads = None,
    resume: o.Resume = False,
    format: Annotated[str | None, typer.Option("--format", help="Of a file; by default the usual one of the kind.")] = (
        None
    ),
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Train an adapter on a base; its file tells which base that was, so that it can be ported later."""
    if base is None:
        raise UsageError("--base is missing", remedy="Give the base to train on.")
    if output is None:
        raise UsageError("--output is missing", remedy="Give the adapter's name with -o.")
    check_writable(output, overwrite=overwrite)
    if format is not None:
        get_format(format)
    shown = {"--cut-mix": cut_mix, "--unmix": unmix, "--prior": prior, "--fit": fit, "--phrase": phrase or None}
    check_belongs(bool(subject), shown, {"--caption": caption, "--held-out": held})
    settings = TrainSettings(
        subjects=subjects(subject, cut_mix, unmix, prior, fit, phrase),
        kind=o.one_of(kind, "--kind", tuple(KINDS)),
        rank=rank,
        alpha=None if alpha is None else o.above_zero(alpha, "--alpha"),
        targets=tuple(targets or ()),
        options=fields(options),
        steps=steps,
        batch=batch,
        rate=None if rate is None else o.above_zero(rate, "--rate"),
        held=TrainSettings.held if held is None else o.share(held, "--held-out"),
        size=size,
        caption=caption,
        dropped=o.share(dropped, "--caption-dropout"),
        context=context,
        seed=seed,
        budget=o.seconds(budget),
        config=config,
        device=device,
        dtype=o.one_of(dtype, "--dtype", o.BASE_DTYPES),
        precision=o.one_of(precision, "--precision", o.PRECISIONS),
        quantize=o.one_of(quantize, "--quantize", get_args(Quantize)),
        checkpointing=checkpointing,
        optimizer=o.one_of(optimizer, "--optimizer", ("adamw", "adamw8bit")),
    )
    o.use_hardware(device, "float32", threads)
    opened = open_base(o.runnable(base))
    state = state_file(data, opened, settings)
    if not resume:
        state.unlink(missing_ok=True)
    with progress("Training", quiet=quiet or json) as tick:
        record = train_adapter(
            data,
            opened,
            output,
            settings,
            format=format,
            overwrite=overwrite,
            state=state,
            tick=tick,
            heard=lambda look: tick(look.step, settings.steps, told(look)),
        )
    emit(record, json=json, quiet=quiet, table=lambda console: train_table(record, console))


def told(look: Look) -> str:
    """A look as the progress line has it."""
    said = [f"loss {look.loss:.4f}"] if look.loss is not None else []
    return "; ".join([*said, *([f"{look.held:.4f} on held-out data"] if look.held is not None else [])])


def check_belongs(by_subject: bool, of_subjects: Mapping[str, object], of_data: Mapping[str, object]) -> None:
    """Make sure that no option is given which the other way of teaching has.

    Args:
        by_subject: whether subjects are learnt.
        of_subjects: option → value, None where it was not given.
        of_data: likewise.

    Raises:
        UsageError: one is.
    """
    stray = next((name for name, value in (of_data if by_subject else of_subjects).items() if value is not None), None)
    if stray is not None and by_subject:
        raise UsageError(f"{stray} is for DATA, and subjects are learnt", remedy="Leave it out with --subject.")
    if stray is not None:
        raise UsageError(f"{stray} is for subjects", remedy="Give --subject with it.")


def subjects(
    given: list[str] | None,
    cut_mix: float | None,
    unmix: float | None,
    prior: int | None,
    fit: str | None,
    phrases: list[str] | None,
) -> SubjectSettings | None:
    """``["mine=<v1> cat"]`` → the folder, special token and class of each subject; None without any.

    Raises:
        UsageError: one has no folder, no token or no class.
    """
    folders = []
    for text in given or ():
        # A folder's name may hold the sign; a token and a class don't.
        folder, _, name = text.rpartition("=")
        identifier, _, noun = name.strip().partition(" ")
        if not folder or not noun.strip():
            raise UsageError(f"--subject {text!r} is no FOLDER=TOKEN NOUN", remedy="As in --subject 'mine=<v1> cat'.")
        folders.append(SubjectFolder(Path(folder), identifier, noun.strip()))
    if not folders:
        return None
    said = {name: str(value) for name, value in fields(phrases, "--phrase").items()}
    usual = SubjectSettings(())
    return SubjectSettings(
        tuple(folders),
        usual.cut_mix if cut_mix is None else o.share(cut_mix, "--cut-mix"),
        usual.unmix if unmix is None else o.finite(unmix, "--unmix"),
        usual.prior if prior is None else prior,
        usual.fit if fit is None else o.one_of(fit, "--fit", ("crop", "whole")),
        said,
    )


def fields(given: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """``["r=8", "init=gaussian"]`` → {"r": 8, "init": "gaussian"}: values are JSON where they can be, else words.

    Raises:
        UsageError: one has no name or no value.
    """
    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"{option} {text!r} is no FIELD=VALUE")
        try:
            found[name.strip()] = json_.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found
