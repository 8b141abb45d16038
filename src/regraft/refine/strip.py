"""Pictures over the course of a refine: a few prompts, always from the same noise, as the student draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from regraft.adapter import Adapter
from regraft.probes.pictures import ContactSheet, makes_pictures
from regraft.probes.sentences import PICTURE_PROMPTS
from regraft.refine.loop import Heard, Look
from regraft.report.schema import Picture
from regraft.runtime.both import BothModels
from regraft.runtime.load import Loaded

#: Prompts that a page shows; and the side that their pictures are stored at, so that a page stays small.
PROMPTS, LARGEST = 4, 192
_OLD, _NEW, _KEPT = "Old base", "New base, over the training", "Kept"


@dataclass
class Strip:
    """One column a look, as far apart as their steps double: a picture changes most at first.

    Looks come from the training's loop, between its steps; nothing is drawn unless the models draw pictures.

    Attributes:
        n: prompts.
        prompts: what to draw; None for general ones.
        seed: of the first row's noise.
        tick: told of each picture.
        seconds: spent on drawing so far; it is not the training's.
    """

    n: int = PROMPTS
    prompts: Sequence[str] | None = None
    seed: int = 0
    tick: Callable[[str], None] = lambda what: None
    seconds: float = 0.0
    _sheet: ContactSheet | None = None
    _next: int = 0
    _drawn: dict[int, Picture] = field(default_factory=dict)
    _until: dict[int, float] = field(default_factory=dict)

    def before(self, models: BothModels, adapter: Adapter) -> None:
        """The old base with its adapter, which is what is wanted, and the new base alone."""
        if self.n < 1 or not makes_pictures(models.old) or not makes_pictures(models.new):
            return
        texts = list(self.prompts if self.prompts is not None else PICTURE_PROMPTS)[: self.n]
        self._sheet = ContactSheet(texts, self.seed, self.tick, LARGEST)
        with models.turn("old"):
            self._add(_OLD, "old + adapter", models.old, adapter)
        with models.turn("new"):
            self._add(_NEW, "new base", models.new)

    def beside(self, student: Loaded, heard: Heard) -> Heard:
        """What is called with a look: the strip first, then ``heard``."""

        def both(look: Look) -> None:
            self.at(look, student)
            heard(look)

        return both

    def at(self, look: Look, student: Loaded) -> None:
        """Called with every look; draws at the first one, and then each time that the steps have doubled."""
        self._until[look.step] = self.seconds
        if self._sheet is not None and look.step >= self._next:
            self._next = max(1, 2 * look.step)
            self._drawn[look.step] = self._add(_NEW, _title(look), student)

    def after(self, best: Look, student: Loaded) -> None:
        """The student at its best, which is what is kept: the last column."""
        if self._sheet is None:
            return
        if best.step not in self._drawn:
            self._add(_KEPT, _title(best), student)
            return
        column = self._drawn[best.step]
        column.group = _KEPT
        self._sheet.columns.sort(key=lambda other: other is column)

    def training(self, look: Look) -> float:
        """Seconds of the training until a look, less those spent on drawing."""
        first = min(self._until.values(), default=0.0)
        return look.seconds - (self._until.get(look.step, first) - first)

    @property
    def columns(self) -> list[Picture]:
        """What was drawn."""
        return [] if self._sheet is None else self._sheet.columns

    @property
    def rows(self) -> list[str]:
        """The prompts that were drawn."""
        return [] if self._sheet is None else list(self._sheet.prompts)

    def _add(self, group: str, title: str, model: Loaded, adapter: Adapter | None = None) -> Picture:
        assert self._sheet is not None
        began = perf_counter()
        try:
            return self._sheet.add(group, title, model, adapter)
        finally:
            self.seconds += perf_counter() - began


def _title(look: Look) -> str:
    return "start" if look.step == 0 else f"{look.step} steps"
