"""Training an adapter on a base, so that its file says from the first day what it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from regraft._version import __version__
from regraft.base import Base
from regraft.errors import InputError, UsageError, first_line
from regraft.memory import peak_mb
from regraft.migration import summarise
from regraft.output import check_writable
from regraft.refine.quantised import check_quantiser, quantise
from regraft.report.train_schema import TrainLook, TrainReport
from regraft.runtime.libraries import library, quiet_libraries
from regraft.runtime.load import Loaded, load_model
from regraft.runtime.room import TRAINING, bytes_of, check_room
from regraft.runtime.training_state import kept_file
from regraft.training.kinds import KINDS, config_of, default_targets, kind_of, settle
from regraft.training.lessons import Lesson, PictureLesson, TextLesson, split
from regraft.training.loop import Course, Heard, Look, Tuned, run
from regraft.training.picture_data import read_pictures
from regraft.training.settings import TrainSettings
from regraft.training.subjects import subject_lesson
from regraft.training.texts import read_examples
from regraft.training.written import file_format, picture_metadata, write_trained

__all__ = ["KINDS", "Look", "TrainSettings", "state_file", "train"]

#: Called with (done, in all, what is at work).
Tick = Callable[[int, int, str], None]

# Texts and pictures in a step.
_TEXTS, _PICTURES = 8, 4
# What may differ between a run and the one that goes on from it.
_FREE = ("steps", "budget", "look", "device", "precision", "checkpointing")


@dataclass(frozen=True)
class _Taught:
    """What is taught, and what the file tells of it.

    Attributes:
        lesson: the data.
        unit: what its examples are.
        batch: of them in a step, by default.
        metadata: for the file's header.
    """

    lesson: Lesson
    unit: str
    batch: int
    metadata: Mapping[str, str]


def train(
    data: Path | None,
    base: Base,
    output: Path,
    settings: TrainSettings = TrainSettings(),
    *,
    format: str | None = None,
    overwrite: bool = False,
    state: Path | None = None,
    tick: Tick = lambda done, total, what: None,
    heard: Heard = lambda look: None,
) -> TrainReport:
    """Train an adapter and write it, stamped with its base.

    Args:
        data: a folder of pictures with captions, for a pipeline; text files, for a language model; None with subjects.
        base: that it is trained on.
        output: PEFT's folder, or a file.
        settings: kind, rank, steps and the rest.
        format: of a file; by default the one of its kind.
        overwrite: replace what is there.
        state: a file that the state of the training is kept in, and gone on from; by default `state_file`.
        tick: told of what is at work.
        heard: called after each look.

    Raises:
        InputError: data or base can't be used, a module can't be changed, or the training comes to nothing.
        OutputError: the output can't be written.
        UsageError: options that don't go together.
    """
    began = perf_counter()
    check_writable(output, overwrite=overwrite)
    kind = kind_of(settings.kind)
    _check(data, settings)
    state = state or state_file(data, base, settings)
    with quiet_libraries():
        tick(0, settings.steps, "loading the base")
        model = _load(base, settings)
        file = file_format(settings.kind, output, format, pipeline=model.pipeline is not None)
        tick(0, settings.steps, "reading the data")
        taught = _taught(data, model, settings)
        quantised = quantise(model, settings.quantize, settings.precision, whose="the base")
        # Of all that is drawn before the first step.
        torch.manual_seed(settings.seed)
        tuned = _tuned(model, settings)
        trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        if not trained or not taught.lesson.n:
            what = "nothing of the adapter is trained" if not trained else "all of the data is held out"
            raise InputError(what, file=base.path if not trained else data, remedy="See --set and --held-out.")
        modules = len(tuned.base_model.targeted_module_names)
        with _before(tuned, settings) as conversion:
            batch, rate = settings.batch or taught.batch, settings.rate or kind.rate
            course = run(model, Tuned(tuned), taught.lesson, settings, batch, rate, heard, state)
            notes = [note for note in (quantised, settle(tuned, settings.kind)) if note]
            written, told = write_trained(
                tuned,
                base,
                output,
                format=file,
                metadata=taught.metadata,
                overwrite=overwrite,
                conversion=conversion,
            )
    if not course.more:
        state.unlink(missing_ok=True)
    return TrainReport(
        regraft_version=__version__,
        data=", ".join(str(place) for place in _places(data, settings)),
        base=summarise(base),
        outputs=[str(written)],
        kind=settings.kind,
        unit=taught.unit,
        learnt=taught.lesson.n,
        trained=trained,
        modules=modules,
        batch=batch,
        rate=rate,
        steps=course.looks[-1].step,
        stopped=course.stopped,
        unkept=course.unkept,
        looks=rows_of(course),
        notes=[*notes, *told],
        seconds=perf_counter() - began,
        peak_mb=peak_mb(),
    )


def state_file(data: Path | None, base: Base, settings: TrainSettings) -> Path:
    """Where the state of a training of this data (by names, sizes and dates), base and settings is kept.

    Raises:
        InputError: there is no such data.
    """
    files: list[Path] = []
    for place in _places(data, settings):
        if not place.exists():
            raise InputError("no such file or folder", file=place, remedy="Check the path of the data.")
        files += sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    asked = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    content = {
        "data": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "base": str(base.prints),
        "settings": asked,
    }
    return kept_file("train", content)


def _places(data: Path | None, settings: TrainSettings) -> list[Path]:
    if data is not None:
        return [data]
    return [one.folder for one in settings.subjects.folders] if settings.subjects is not None else []


def _check(data: Path | None, settings: TrainSettings) -> None:
    if (data is None) == (settings.subjects is None):
        raise UsageError("either data or subjects are learnt", remedy="Name DATA, or give --subject.")
    if settings.subjects is not None and settings.subjects.unmix and settings.checkpointing:
        raise UsageError(
            "unmix needs the attention that gradient checkpointing forgets", remedy="Leave one of the two out."
        )
    check_quantiser(settings.quantize)
    kind = kind_of(settings.kind)
    start = str(settings.options.get("init_lora_weights", ""))
    if start.startswith("loftq"):
        raise UsageError("LoftQ changes the base that it begins on", remedy="Take --kind lora with --quantize 4bit.")
    if start == "lora_ga" or settings.options.get("kasa_config"):
        what = "LoRA-GA begins from gradients that are taken apart" if start == "lora_ga" else "KaSA changes the base"
        raise UsageError(what, remedy="Train it with PEFT, or take --kind pissa.")
    if (kind.by_weight or changes_base(settings)) and settings.quantize != "none":
        raise UsageError(
            f"a {settings.kind} is computed from the base's weights: of quantised ones it belongs to another base",
            remedy="Leave --quantize out, or take another kind.",
        )
    # A rank or a field that the kind lacks is told before the base is loaded.
    config_of(
        settings.kind,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets or ("all-linear",),
        options=settings.options,
    )


def changes_base(settings: TrainSettings) -> bool:
    """Whether it begins with an effect, on weights that lack it: PEFT can write it as a LoRA of the whole base."""
    start = {**kind_of(settings.kind).fixed, **settings.options}.get("init_lora_weights")
    return isinstance(start, str) and start.startswith(("pissa", "olora", "corda"))


def _load(base: Base, settings: TrainSettings) -> Loaded:
    check_room((base,), settings.device, each=bytes_of(settings.dtype), remedy=TRAINING)
    model = load_model(base.path, config=settings.config, device=settings.device, dtype=settings.dtype)
    if model.kind == "encoder" or getattr(model.main.config, "is_encoder_decoder", False):
        raise InputError(
            f"a {model.name} is no causal language model: it has no loss of its own on texts",
            file=base.path,
            remedy="Train it with PEFT and a head of your own, and stamp the file: regraft lineage stamp.",
        )
    if model.kind == "denoiser" and model.pipeline is None:
        raise InputError(
            f"a {model.name} alone can't be trained on pictures",
            file=base.path,
            remedy="Give the pipeline's folder (the one with model_index.json).",
        )
    return model


def _taught(data: Path | None, model: Loaded, settings: TrainSettings) -> _Taught:
    if data is None:
        return _subjects(model, settings)
    if model.pipeline is None:
        examples = read_examples(data, model, settings.context)
        fit, apart = split(len(examples), settings.held, settings.seed)
        return _Taught(TextLesson([examples[i] for i in fit], [examples[i] for i in apart]), "texts", _TEXTS, {})
    pictures = read_pictures(data, model, settings.size, settings.caption)
    fit, apart = split(len(pictures), settings.held, settings.seed)
    lesson = PictureLesson(pictures, fit, apart, settings.dropped, settings.seed)
    return _Taught(lesson, "pictures", _PICTURES, picture_metadata(pictures.captions, pictures.size))


def _subjects(model: Loaded, settings: TrainSettings) -> _Taught:
    assert settings.subjects is not None
    if model.pipeline is None:
        raise InputError(f"subjects are learnt by a pipeline, not by a {model.name}", file=model.path)
    lesson = subject_lesson(model, settings.subjects, settings.size, settings.dropped, settings.seed)
    one = lesson.draws.phrases.one
    captions = [one.format(subject.name) for subject in lesson.draws.subjects for _ in subject.pictures]
    return _Taught(lesson, "pictures", _PICTURES, picture_metadata(captions, lesson.draws.size))


def _tuned(model: Loaded, settings: TrainSettings) -> Any:
    """PEFT's model around the main model, whose layers it changes in place."""
    config = config_of(
        settings.kind,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets or default_targets(model.main, settings.kind, denoiser=model.pipeline is not None),
        options=settings.options,
    )
    if model.pipeline is None:
        config.task_type = "CAUSAL_LM"
    try:
        return library("peft").get_peft_model(model.main, config)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, LookupError, AttributeError) as error:
        what = f"PEFT can't put a {settings.kind} on it ({first_line(error)})"
        raise InputError(what, file=model.path, remedy="See --rank, --targets and --set.") from error


@contextmanager
def _before(tuned: Any, settings: TrainSettings) -> Iterator[Path | None]:
    """The adapter as it begins, where it begins with an effect on a changed base: PEFT writes the difference."""
    if not changes_base(settings):
        yield None
        return
    with TemporaryDirectory() as place:
        config = tuned.peft_config["default"]
        asked = config.init_lora_weights
        # Or PEFT would take what it reads for one more to be initialised.
        config.init_lora_weights = True
        tuned.save_pretrained(place, save_embedding_layers=False)
        config.init_lora_weights = asked
        yield Path(place)


def rows_of(course: Course) -> list[TrainLook]:
    """The looks of a training as records have them."""
    return [TrainLook(step=look.step, loss=look.loss, held=look.held, seconds=look.seconds) for look in course.looks]
