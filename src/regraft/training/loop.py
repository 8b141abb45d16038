"""The training itself: steps over a lesson, measurements on the way, and a state to go on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.output import undisturbed
from regraft.runtime.libraries import library
from regraft.runtime.load import Loaded
from regraft.runtime.optim import Optimizer, Precision, Stepper, checkpoint_activations, epoch_order
from regraft.runtime.training_state import keep, taken_up
from regraft.training.lessons import Lesson


@dataclass(frozen=True)
class Look:
    """How it stands after some steps.

    Attributes:
        step: how many.
        loss: mean of the steps since the look before; None before any.
        held: on data that nothing is learnt from; None without any.
        seconds: since the start.
    """

    step: int
    loss: float | None
    held: float | None
    seconds: float


class Pace(Protocol):
    """What a training's settings say of its steps; see `regraft.training.settings.TrainSettings`."""

    @property
    def steps(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def budget(self) -> float | None: ...
    @property
    def look(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def checkpointing(self) -> bool: ...
    @property
    def optimizer(self) -> Optimizer: ...


class Learner(Protocol):
    """What is trained, beside the model that it is part of or acts on."""

    def parameters(self) -> Iterable[Any]:
        """All; those with gradients are trained."""
        ...

    def train(self) -> object:
        """Before a step."""
        ...

    def eval(self) -> object:
        """Before a measurement."""
        ...

    def kept(self) -> dict[str, Tensor]:
        """All that it has learnt."""
        ...

    def take(self, kept: dict[str, Tensor]) -> object:
        """The inverse of `kept`."""
        ...

    def stepped(self) -> None:
        """Told after each step."""
        ...


@dataclass(frozen=True)
class Tuned:
    """A model that PEFT has put an adapter into.

    Attributes:
        model: PEFT's.
    """

    model: Any

    def parameters(self) -> Iterable[Any]:
        found: Iterable[Any] = self.model.parameters()
        return found

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()

    def kept(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = library("peft").get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return found

    def take(self, kept: dict[str, Tensor]) -> None:
        library("peft").set_peft_model_state_dict(self.model, kept)

    def stepped(self) -> None:
        pass


#: Called with each look.
Heard = Callable[[Look], None]


@dataclass
class Course:
    """A training as far as it has come.

    Attributes:
        looks: all so far, the first before any step.
        stopped: why it ended.
        unkept: why its state could not be kept on disk.
        more: it was stopped before its end, and can go on from its state.
    """

    looks: list[Look] = field(default_factory=list)
    stopped: str = ""
    unkept: str = ""
    more: bool = False


def run(
    model: Loaded,
    tuned: Learner,
    lesson: Lesson,
    settings: Pace,
    batch: int,
    rate: float,
    heard: Heard,
    state: Path,
) -> Course:
    """Train what has gradients, in place.

    Args:
        model: that the lesson is for.
        tuned: what is trained: an adapter in it (`Tuned`), or something beside it.
        lesson: what is learnt.
        settings: steps, seed and the rest.
        batch: examples in a step.
        rate: learning rate at its peak.
        heard: called after each look.
        state: a file to keep the state in, and to go on from where it is there.

    Raises:
        InputError: the loss is no number from the first step on, or the state is damaged.
        KeyboardInterrupt: after the state was kept.
    """
    made = _Run(model, tuned, lesson, settings, batch, rate, heard)
    if state.is_file():
        made.resume(state)
    try:
        made.go(state)
    except KeyboardInterrupt:
        made.save(state)
        raise
    return made.course


class _Run:
    def __init__(
        self, model: Loaded, tuned: Learner, lesson: Lesson, settings: Pace, batch: int, rate: float, heard: Heard
    ) -> None:
        self.model, self.tuned, self.lesson, self.settings, self.heard = model, tuned, lesson, settings, heard
        self.batch = batch
        parameters = [p for p in tuned.parameters() if p.requires_grad]
        self.stepper = Stepper(parameters, settings.optimizer, rate, settings.precision, settings.device)
        self.step, self.spent = 0, 0.0
        self.losses: list[float] = []
        self.course = Course()
        if settings.checkpointing:
            checkpoint_activations(model)
            # Without this nothing before the first adapter has gradients, and a checkpointed block passes none on.
            enable = getattr(model.main, "enable_input_require_grads", None)
            if enable is not None:
                enable()

    def go(self, state: Path) -> None:
        settings, course = self.settings, self.course
        began = perf_counter() - self.spent
        done = bool(course.looks) and course.looks[-1].step == self.step
        if not done and (self.step % settings.look == 0 or self.step == settings.steps):
            # The first; or one that was interrupted.
            self.look(began)
        while self.step < settings.steps:
            loss = self.one_step()
            if not math.isfinite(loss):
                if self.step == 0:
                    raise InputError("the loss is not a number", remedy="Lower --rate, or train in float32.")
                self.look(began)
                course.stopped = f"the loss was no number at step {self.step + 1}; the last good state is kept"
                return
            self.losses.append(loss)
            self.spent = perf_counter() - began
            over = settings.budget is not None and self.spent > settings.budget
            if self.step % settings.look == 0 or over or self.step == settings.steps:
                self.look(began)
                self.save(state)
            if over and self.step < settings.steps:
                course.stopped, course.more = f"the budget of {settings.budget:.0f} s was spent", True
                return
        course.stopped = f"all {settings.steps} steps were made"

    def chosen(self) -> list[int]:
        """The next step's examples, in the seed's order; each once before any a second time."""
        first, n = self.step * self.batch, self.lesson.n
        places = (divmod(number, n) for number in range(first, first + self.batch))
        return [epoch_order(n, self.settings.seed, epoch)[place] for epoch, place in places]

    def one_step(self) -> float:
        # Every step has draws of its own, so that one that goes on is the one that was never stopped.
        drawn = (self.settings.seed * 1_000_003 + self.step) % (1 << 62)
        torch.manual_seed(drawn)
        self.stepper.at(self.step, self.settings.steps)
        self.tuned.train()
        with torch.enable_grad(), self.stepper.accelerator.autocast():
            loss = self.lesson.loss(self.model, self.chosen(), torch.Generator().manual_seed(drawn))
        # An interrupt between the step and its count would have it made twice.
        with undisturbed():
            value = self.stepper.learn(loss)
            if math.isfinite(value):
                self.step += 1
                self.tuned.stepped()
        return value

    def look(self, began: float) -> None:
        self.tuned.eval()
        with self.stepper.accelerator.autocast():
            held = self.lesson.held(self.model)
        loss = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses.clear()
        look = Look(self.step, loss, held, perf_counter() - began)
        self.course.looks.append(look)
        self.heard(look)

    def save(self, file: Path) -> None:
        content = {
            "step": self.step,
            "spent": self.spent,
            "losses": self.losses,
            "tuned": self.tuned.kept(),
            "looks": [list(astuple(look)) for look in self.course.looks],
            "optimizer": self.stepper.optimizer.state_dict(),
            "scaler": self.stepper.scaling(),
        }
        self.course.unkept = keep(content, file) or self.course.unkept

    def resume(self, file: Path) -> None:
        """Go on from a state that `save` kept.

        Raises:
            InputError: it is damaged.
        """
        with taken_up(file) as found:
            self.tuned.take(found["tuned"])
            self.stepper.optimizer.load_state_dict(found["optimizer"])
            self.stepper.scale_as(found["scaler"])
            self.step, self.spent, self.losses = found["step"], found["spent"], found["losses"]
            self.course = Course([Look(*look) for look in found["looks"]])
