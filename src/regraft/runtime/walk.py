"""A forward pass that stops at chosen modules, so that a module's weight can be changed on the way.

Each walk is a thread of its own, of which one runs at a time: whoever asks for the next stop waits for it. So several
models, and several batches, go through their layers side by side, and what is held is what their passes hold.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

Key = TypeVar("Key")
When = Literal["before", "after"]


class _Left(BaseException):
    """Ends a walk that nobody waits for any more."""


class Walk(Generic[Key]):
    """One run of a model, stopped before or after each of some modules."""

    def __init__(self, run: Callable[[], Tensor], modules: Mapping[Key, nn.Module], when: When) -> None:
        """Start at the first module.

        Args:
            run: the forward pass.
            modules: where to stop; each runs once.
            when: stop ``before`` a module, with its input, or ``after``, with its input and output.
        """
        self.output: Tensor | None = None
        self._run, self._when = run, when
        self._stops: dict[Key, tuple[Tensor, Tensor | None]] = {}
        self._ours, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._left, self._done = False, False
        self._error: BaseException | None = None
        self._hooks = [self._hook(key, module) for key, module in modules.items()]
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _hook(self, key: Key, module: nn.Module) -> Any:
        # Two walks through one model have hooks on the same modules: each minds its own.
        if self._when == "before":

            def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if threading.current_thread() is self._thread:
                    self._stop(key, args[0], None)

            return module.register_forward_pre_hook(before)

        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if threading.current_thread() is self._thread:
                self._stop(key, args[0], output)

        return module.register_forward_hook(after)

    def _work(self) -> None:
        try:
            self._wait()
            # Whether gradients are recorded is a setting of the thread.
            with torch.no_grad():
                self.output = self._run()
        except _Left:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._done = True
            self._theirs.release()

    def _stop(self, key: Key, x: Tensor, y: Tensor | None) -> None:
        self._stops[key] = (x, y)
        self._theirs.release()
        self._wait()

    def _wait(self) -> None:
        self._ours.acquire()
        if self._left:
            raise _Left

    def _go_on(self) -> None:
        self._ours.release()
        self._theirs.acquire()
        if self._error is not None:
            raise self._error

    def at(self, key: Key) -> tuple[Tensor, Tensor | None] | None:
        """Input and output of a module, once the walk is there; None where it never comes by.

        Stops on the way are kept until they are asked for; each can be asked for once. After a stop ``before`` a
        module, the module runs when the walk is asked for the next.
        """
        while key not in self._stops and not self._done:
            self._go_on()
        return self._stops.pop(key, None)

    def finish(self) -> Tensor:
        """Go on to the end: the model's output."""
        while not self._done:
            self._go_on()
        assert self.output is not None
        return self.output

    def close(self) -> None:
        """Leave, wherever the walk is."""
        if not self._done:
            self._left = True
            self._ours.release()
            self._thread.join()
        for hook in self._hooks:
            hook.remove()
        self._stops.clear()


class Walks(Generic[Key]):
    """The same walk for several batches, one behind the other."""

    def __init__(self, runs: Sequence[Callable[[], Tensor]], modules: Mapping[Key, nn.Module], when: When) -> None:
        self.walks = [Walk(run, modules, when) for run in runs]

    def __enter__(self) -> Walks[Key]:
        return self

    def __exit__(self, *_: object) -> None:
        for walk in self.walks:
            walk.close()
