"""What a format can hold, found out by asking its writer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from regraft.adapter import Adapter, ModuleRef
from regraft.errors import OutputError, UsageError
from regraft.formats import Format
from regraft.formats._factors import KEEP
from regraft.report.ops_schema import ConvertedModule
from regraft.updates import LowRank, SpectralShift, Update


class Held:
    """What a format can hold, by asking its writer once for every sort of update."""

    def __init__(self, adapter: Adapter, format: Format) -> None:
        if format.write is None:
            raise UsageError(f"format {format.name!r} can be read, not written", remedy="Choose another with --format.")
        self.adapter, self.write = adapter, format.write
        self.answers: dict[tuple[object, ...], str | None] = {}
        self.accepted: dict[ModuleRef, Update] = {}

    def refusal(self, updates: Mapping[ModuleRef, Update]) -> str | None:
        """Why the format can't hold these updates beside those that it was found to hold; None where it can."""
        sort = tuple(part for ref, update in updates.items() for part in _sort(ref, update))
        if sort not in self.answers:
            together = {**self.accepted, **updates}
            try:
                self.write(replace(self.adapter, updates=together, tokens={}, sidecars={}))
            except OutputError as error:
                self.answers[sort] = _why(error)
            else:
                self.answers[sort], self.accepted = None, together
        return self.answers[sort]

    def lost_tokens(self) -> list[ConvertedModule]:
        """A row for every added token, where the format has no place for them."""
        if not self.adapter.tokens:
            return []
        try:
            self.write(replace(self.adapter, updates=self.accepted, sidecars={}))
        except OutputError as error:
            return [
                ConvertedModule(
                    name=str(token),
                    kind="token",
                    becomes=None,
                    status="lost",
                    rank_in=None,
                    rank_out=None,
                    reason=_why(error),
                )
                for token in self.adapter.tokens
            ]
        return []


def _why(error: OutputError) -> str:
    # That the old format can hold it goes without saying.
    return error.what if error.remedy in (None, KEEP) else f"{error.what}. {error.remedy}"


def _sort(ref: ModuleRef, update: Update) -> tuple[object, ...]:
    """What a writer may look at: two updates of one sort are held alike."""
    parts = {role: (len(part.shape), _ones(part.shape)) for role, part in update.parts().items()}
    if not isinstance(update, LowRank):
        parts = {role: about for role, about in parts.items() if role == "magnitude"} | dict.fromkeys(parts, (0, ()))
    # SVDiff's files hold one number on a norm, and many on any other module.
    named = update.by_parameter or isinstance(update, SpectralShift)
    last = ref.path.rpartition(".")[2] if named else ""
    layout = getattr(update, "orientation", None), getattr(update, "convention", None), len(update.shape)
    return ref.component, update.kind, last, *layout, tuple(sorted(parts.items()))


def _ones(shape: tuple[int, ...]) -> tuple[bool, ...]:
    return tuple(size == 1 for size in shape)
