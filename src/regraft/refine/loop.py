"""The training: steps over the aims, looks at held-out inputs, an early stop, and a state to go on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.refine.aims import Aim
from regraft.refine.pictures import PreparedBatch
from regraft.refine.settings import STEPS, RefineSettings
from regraft.refine.states import watching
from regraft.refine.student import Student
from regraft.runtime.load import Loaded
from regraft.runtime.optim import Stepper, checkpoint_activations, epoch_order
from regraft.runtime.training_state import keep, taken_up

# A start that lacks less than this has nothing left to gain.
_ALL = 1e-3
# A look is better by at least this share of what is wanted, or it is no gain.
_GAIN = 1e-3


@dataclass(frozen=True)
class Look:
    """What held-out inputs say after some steps.

    Attributes:
        step: how many.
        loss: mean distance from what is wanted, in that of the new base alone: 1 is the new base, 0 all that is wanted.
        kept: the same on inputs that the new base made, in distances of the adapter's own effect; None without any.
        seconds: since the start.
        learnt: mean loss of the training steps since the look before, in the new base's mean distance; None before any.
        most: steps that there will be at most.
    """

    step: int
    loss: float
    kept: float | None
    seconds: float
    learnt: float | None = None
    most: int = STEPS

    @property
    def recovered(self) -> float:
        """The share of what is wanted that is there."""
        return 1.0 - self.loss


#: Called with each look.
Heard = Callable[[Look], None]


@dataclass
class Course:
    """A training as far as it has come.

    Attributes:
        looks: all so far, the first before any step.
        best: the trained numbers at the best look.
        stopped: why it ended.
        unkept: why its state could not be kept on disk.
    """

    looks: list[Look] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    stopped: str = ""
    unkept: str = ""

    @property
    def best_look(self) -> Look:
        return min(self.looks, key=lambda look: look.loss)

    def without_gain(self) -> int:
        """How many looks there were since the last one that was clearly better than all before it."""
        best, since = math.inf, 0
        for look in self.looks:
            since = 0 if look.loss < best - _GAIN else since + 1
            best = best if since else look.loss
        return since


def train(
    student: Student,
    fit: Sequence[Aim],
    held: Sequence[Aim],
    settings: RefineSettings,
    *,
    heard: Heard = lambda look: None,
    state: Path | None = None,
) -> Course:
    """Train a student until held-out inputs say that no more comes of it; it is left at its best.

    Args:
        student: trained in place.
        fit: aims to learn from.
        held: aims to look at.
        settings: steps, rate, budget and the rest.
        heard: called after each look.
        state: a file to keep the state in, and to go on from where it is there.

    Raises:
        InputError: the loss is no number from the first step on.
        KeyboardInterrupt: after the state was kept.
    """
    run = _Run(student, fit, held, settings, heard)
    if state is not None and state.is_file():
        run.resume(state)
    batches = () if student.encoders else [aim.batch for aim in (*fit, *held)]
    prepared = [batch for batch in batches if isinstance(batch, PreparedBatch)]
    for batch in prepared:
        batch.prepare(student.model)
    try:
        run.go(state)
    except KeyboardInterrupt:
        if state is not None:
            run.save(state)
        raise
    finally:
        for batch in prepared:
            batch.forget(student.model)
    student.load(run.course.best)
    return run.course


class _Run:
    def __init__(
        self, student: Student, fit: Sequence[Aim], held: Sequence[Aim], settings: RefineSettings, heard: Heard
    ) -> None:
        self.student, self.held, self.settings, self.heard = student, held, settings, heard
        self.tasks = [aim for aim in fit if not aim.retention]
        self.kept = [aim for aim in fit if aim.retention]
        self.stepper = Stepper(
            student.parameters(), settings.optimizer, settings.rate, settings.precision, settings.device
        )
        self.step, self.spent = 0, 0.0
        self.losses: list[float] = []
        self.most = settings.steps or STEPS
        self.course = Course()
        # One unit for all: a batch on which the adapter does little counts little.
        self.size = sum(aim.size for aim in self.tasks) / len(self.tasks)
        if settings.checkpointing:
            checkpoint_activations(student.model)

    def go(self, state: Path | None) -> None:
        settings, course = self.settings, self.course
        began = perf_counter() - self.spent
        if not course.looks:
            self.look(began)
            if course.looks[0].loss < _ALL:
                course.stopped = "the start has all that is wanted"
                return
        while self.step < self.most:
            loss = self.one_step(self.chosen())
            self.step += 1
            if not math.isfinite(loss):
                if self.step == 1:
                    raise InputError("the loss is not a number", remedy="Lower --rate, or run in float32.")
                course.stopped = f"the loss was no number at step {self.step}; the last good state is kept"
                return
            self.losses.append(loss)
            self.spent = perf_counter() - began
            over = settings.budget is not None and self.spent > settings.budget
            if self.step % settings.look == 0 or over or self.step == self.most:
                self.look(began)
                if state is not None:
                    self.save(state)
                since = course.without_gain()
                if since >= settings.patience:
                    course.stopped = f"no gain on held-out inputs in {since * settings.look} steps"
                    return
            if over:
                course.stopped = f"the budget of {settings.budget:.0f} s was spent"
                return
        course.stopped = f"all {self.most} steps were made"

    def chosen(self) -> Aim:
        """The next step's aim: in the seed's order, every so many of them for retention."""
        share = self.settings.kept if self.kept else 0.0
        before, after = (math.floor(share * n) for n in (self.step, self.step + 1))
        pool, number = (self.kept, before) if after > before else (self.tasks, self.step - before)
        epoch, place = divmod(number, len(pool))
        return pool[epoch_order(len(pool), self.settings.seed, epoch)[place]]

    def one_step(self, aim: Aim) -> float:
        self.stepper.at(self.step, self.most)
        blocks = () if aim.hidden is None else aim.hidden.wanted
        with torch.enable_grad(), self.stepper.accelerator.autocast(), watching(self.student.model, blocks) as seen:
            outputs = aim.told(_forward(aim, self.student))
        with torch.enable_grad():
            loss = aim.loss(outputs) / self.size
            if aim.hidden is not None:
                loss = loss + self.settings.hidden * aim.hidden.distance(seen)
        return self.stepper.learn(loss)

    @torch.no_grad()
    def look(self, began: float) -> None:
        task, kept = measured(self.held, self.student.model)
        learnt = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses.clear()
        look = Look(self.step, math.inf if task is None else task, kept, perf_counter() - began, learnt, self.most)
        if math.isfinite(look.loss) and (not self.course.looks or look.loss < self.course.best_look.loss):
            self.course.best = self.student.state()
        self.course.looks.append(look)
        self.heard(look)

    def save(self, file: Path) -> None:
        content = {
            "step": self.step,
            "spent": self.spent,
            "now": self.student.state(),
            "best": self.course.best,
            "looks": [list(astuple(look)) for look in self.course.looks],
            "optimizer": self.stepper.optimizer.state_dict(),
        }
        self.course.unkept = keep(content, file) or self.course.unkept

    def resume(self, file: Path) -> None:
        """Go on from a state that `save` kept.

        Raises:
            InputError: it is damaged.
        """
        with taken_up(file) as found:
            self.student.load(found["now"])
            self.stepper.optimizer.load_state_dict(found["optimizer"])
            self.step, self.spent = found["step"], found["spent"]
            self.course = Course([Look(*look) for look in found["looks"]], found["best"])


@torch.no_grad()
def measured(held: Sequence[Aim], model: Loaded) -> tuple[float | None, float | None]:
    """How far a model stands from the aims, in the new base's distance; and the same on inputs that are for retention.

    Args:
        held: aims.
        model: the new base with or without an adapter.

    Returns:
        Both None where there are no such aims, or where the new base alone has all that they want.
    """
    sums = {False: [0.0, 0.0], True: [0.0, 0.0]}
    for aim in held:
        got = float(aim.distance(aim.told(aim.batch.run(model, "new"))))
        sums[aim.retention][0] += len(aim.batch) * got
        sums[aim.retention][1] += len(aim.batch) * aim.size
    task, kept = ((got / most if most > 0 else None) for got, most in (sums[False], sums[True]))
    return task, kept


def _forward(aim: Aim, student: Student) -> Tensor:
    """`Batch.run` with gradients."""
    batch, model = aim.batch, student.model
    if isinstance(batch, PreparedBatch):
        known = batch.known.get(id(model.main))
        return batch.predict(model, batch.conditions(model, gradients=True) if known is None else known)
    run = type(batch).run
    # Batches run without gradients for everyone else.
    outputs: Tensor = getattr(run, "__wrapped__", run)(batch, model, "new")
    return outputs
