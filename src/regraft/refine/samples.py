"""Sample distillation: where a pair shares no output space, what the old base makes with the adapter is learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from regraft.adapter import Adapter
from regraft.errors import InputError, UsageError
from regraft.probes.batches import Batch, Batches, writes
from regraft.refine.aims import Aim
from regraft.refine.bridged import painter_of
from regraft.refine.drawn import picture_aims, picture_samples
from regraft.refine.sampled import text_aims, text_samples
from regraft.refine.settings import Objective, RefineSettings, TeacherKind
from regraft.refine.shared import unshared
from regraft.refine.teacher import Teacher
from regraft.runtime.both import BothModels

Tick = Callable[[int, int, str], None]


def objective_of(asked: Objective, models: BothModels, teacher: TeacherKind = "adapter") -> tuple[str, str]:
    """The objective, and why: `auto` matches outputs, and learns from samples where outputs can't be compared.

    Raises:
        UsageError: outputs are to be matched, and can't be compared.
        InputError: see `regraft.refine.shared.unshared`.
    """
    if teacher == "bridge":
        if asked not in ("auto", "sample"):
            raise UsageError(
                f"--objective {asked} compares outputs with the old base's, and what a bridge shows is learnt",
                remedy="Take --objective sample, or leave the option out.",
            )
        return "sample", "what the bridge shows is learnt"
    why = unshared(models)
    if asked == "auto":
        return ("sample", why) if why else ("output", "both bases give comparable outputs on the same inputs")
    if why and asked != "sample":
        raise UsageError(
            f"--objective {asked} compares outputs, and {why}",
            remedy="Take --objective sample, or leave the option out.",
        )
    return asked, "as asked"


def samples_of(models: BothModels, adapter: Adapter, settings: RefineSettings) -> Batches:
    """What the old base makes with the adapter, and for retention the new base.

    Raises:
        InputError: nothing can be made of it, or what is made is useless.
    """
    if models.old.kind != "denoiser":
        return texts_of(models, Teacher.of(models, adapter), settings)
    asked = (settings.n_inputs, settings.seed, settings.prompts)
    painter = painter_of(models, adapter, settings)
    return picture_samples(
        models,
        adapter,
        *asked,
        kept=settings.kept > 0,
        dropped=settings.filter,
        guidance=settings.guidance,
        painter=painter,
    )


def texts_of(models: BothModels, teacher: Teacher, settings: RefineSettings) -> Batches:
    """What a teacher of any kind writes, and for retention the new base.

    Raises:
        InputError: one of the models writes nothing, or what is written is useless.
    """
    if models.old.kind != "language":
        raise InputError("gives hidden states alone: it makes nothing to learn from", file=models.old.path)
    for model in (models.old, models.new):
        if model.kind == "language" and not writes(model):
            raise InputError(
                "does not read from left to right alone: no texts can be drawn from it to learn from", file=model.path
            )
    asked = (settings.n_inputs, settings.seed, settings.prompts)
    return text_samples(models, teacher, *asked, kept=settings.kept > 0, dropped=settings.filter)


def sample_aims(
    models: BothModels,
    teacher: Teacher,
    batches: Sequence[Batch],
    *,
    tick: Tick = lambda done, total, what: None,
) -> list[Aim]:
    """Aims for what `samples_of` gave; those of retention in the size of what is to be learnt, so that both compare.

    Raises:
        InputError: the new base alone does as well as the old one with the adapter.
    """
    language = models.old.kind == "language"
    aims = text_aims(models, teacher, batches, tick=tick) if language else picture_aims(models, batches, tick=tick)
    sizes = [aim.size for aim in aims if not aim.retention]
    mean = sum(sizes) / len(sizes)
    if not mean > 0:
        raise InputError(
            "has no effect that could be learnt: the new base alone does as well on what the old one makes with it",
            file=teacher.path,
            remedy="Is the old base the one that it was trained on? `regraft identify` looks for the right one.",
        )
    return [replace(aim, size=mean) if aim.retention else aim for aim in aims]
