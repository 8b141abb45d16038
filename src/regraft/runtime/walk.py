"""A forward pass that stops at chosen modules, so that what a module gives can be looked at or chosen on the way.

Each walk is a course of its own (a greenlet): it runs when it is asked for the next stop, and whoever asks waits for
it. So several models, and several batches, go through their layers side by side, and what is held is what their passes
hold. They are all one thread to the system: with a thread for each, OpenMP keeps a team of threads for each of them,
and the teams take the processor from one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from regraft.runtime.libraries import library

Key = TypeVar("Key")
When = Literal["instead", "after"]


def course() -> object:
    """What runs here: the same object within a walk, and another in every other one and outside."""
    found: object = library("greenlet").getcurrent()
    return found


class Walk(Generic[Key]):
    """One run of a model, stopped at each of some modules; made by `Walks`."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        """Nothing is run yet.

        Args:
            run: the forward pass.
        """
        self.output: Tensor | None = None
        self._run = run
        self._stops: dict[Key, tuple[Tensor, Tensor | None]] = {}
        self._answer: Tensor | None = None
        self._course: Any = library("greenlet").greenlet(self._work)

    @property
    def course(self) -> object:
        """The `course` of its run."""
        return self._course

    def _work(self) -> None:
        self.output = self._run()

    def stop(self, key: Key, x: Tensor, y: Tensor | None) -> Tensor | None:
        """Wait, within the run, until the walk is asked for the next stop; returns what was answered meanwhile."""
        self._stops[key] = (x, y)
        self._course.parent.switch()
        answer, self._answer = self._answer, None
        return answer

    def _go_on(self) -> None:
        self._course.parent = course()
        # Whether gradients are recorded is a setting of the thread, which the runs share: they leave it as it is here.
        with torch.no_grad():
            self._course.switch()

    def at(self, key: Key) -> tuple[Tensor, Tensor | None] | None:
        """Input and output of a module, once the walk is there; None where it never comes by.

        Stops on the way are kept until they are asked for; each can be asked for once.
        """
        while key not in self._stops and not self._course.dead:
            self._go_on()
        return self._stops.pop(key, None)

    def answer(self, output: Tensor) -> None:
        """What the module gives at which the walk stands, in place of running it."""
        self._answer = output

    def finish(self) -> Tensor:
        """Go on to the end: the model's output."""
        while not self._course.dead:
            self._go_on()
        assert self.output is not None
        return self.output

    def close(self) -> None:
        """Leave, wherever the walk is."""
        if not self._course.dead:
            self._course.throw()
        self._stops.clear()


class Walks(Generic[Key]):
    """The same walk for several batches, one behind the other."""

    def __init__(self, runs: Sequence[Callable[[], Tensor]], modules: Mapping[Key, nn.Module], when: When) -> None:
        """Each stands before the beginning.

        Args:
            runs: a forward pass for each batch, of one model.
            modules: where to stop; each runs once in a pass.
            when: stop ``after`` a module, with its input and output, or ``instead`` of it, with its input: the module
                runs when the walk is asked for the next stop, unless it is answered what it gives.
        """
        self.walks: list[Walk[Key]] = [Walk(run) for run in runs]
        self._by_course = {id(walk.course): walk for walk in self.walks}
        self._undo: list[Callable[[], None]] = []
        for key, module in modules.items():
            (self._stop_after if when == "after" else self._stop_instead)(key, module)

    def _here(self) -> Walk[Key] | None:
        # Others may run the same model meanwhile: a stop is for the walks' own runs.
        return self._by_course.get(id(course()))

    def _stop_after(self, key: Key, module: nn.Module) -> None:
        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if (walk := self._here()) is not None:
                walk.stop(key, args[0], output)

        self._undo.append(module.register_forward_hook(after).remove)

    def _stop_instead(self, key: Key, module: nn.Module) -> None:
        own, was_own = module.forward, "forward" in module.__dict__

        def instead(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            walk = self._here()
            answer = None if walk is None else walk.stop(key, x, None)
            return own(x, *args, **kwargs) if answer is None else answer

        def undo() -> None:
            if was_own:
                module.forward = own
            else:
                del module.forward

        module.forward = instead
        self._undo.append(undo)

    def __enter__(self) -> Walks[Key]:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for walk in self.walks:
                walk.close()
        finally:
            for undo in self._undo:
                undo()
