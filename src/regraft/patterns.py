"""Regular expressions out of a stranger's config, matched in time that can't explode.

Python's own engine goes back and tries again: a pattern such as ``(a+)+$`` in an ``adapter_config.json`` would hold it
for years. Here all ways through a pattern are followed side by side (Thompson 1968), which takes a step per character.
What such an engine can't do (references back, looking ahead) no PEFT config needs, and is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as _sre  # type: ignore[attr-defined]
    from re import _parser as _parse  # type: ignore[attr-defined]
else:
    import sre_constants as _sre
    import sre_parse as _parse

# A state per character and repetition: PEFT's own patterns have tens.
_MOST_STATES = 2000

#: A test of one character.
Test = Callable[[str], bool]


class TooComplex(ValueError):
    """A pattern that would need more than following its states."""


@dataclass
class _State:
    """One place in a pattern: what the next character must be, or an anchor, and where it leads."""

    test: Test | None = None
    anchor: str = ""
    to: list[int] = field(default_factory=list)


class Pattern:
    """A compiled pattern; ``matches`` says what ``re.match`` would.

    Raises:
        re.error: it is no regular expression.
        TooComplex: it is one that this engine does not follow.

    >>> Pattern(r"(.*\\.)?(q|k)_proj$").matches("layers.0.q_proj")
    True
    """

    def __init__(self, pattern: str) -> None:
        self._states: list[_State] = [_State()]
        try:
            tree = _parse.parse(pattern)
        except (RecursionError, OverflowError):
            raise TooComplex("is too deep") from None
        if tree.state.flags & ~re.UNICODE:
            raise TooComplex("has flags")
        self._end = self._sequence(tree, 0)

    def matches(self, text: str) -> bool:
        """Whether the pattern matches from the beginning of ``text``."""
        current = self._closure([0], text, 0)
        for at, character in enumerate(text):
            if self._end in current:
                return True
            if not current:
                return False
            heads = (state for number in current if (state := self._states[number]).test and state.test(character))
            current = self._closure([to for state in heads for to in state.to], text, at + 1)
        return self._end in current

    def _closure(self, numbers: Iterable[int], text: str, at: int) -> set[int]:
        seen: set[int] = set()
        ahead = list(numbers)
        while ahead:
            number = ahead.pop()
            if number in seen:
                continue
            seen.add(number)
            state = self._states[number]
            if state.test is None and (not state.anchor or _holds(state.anchor, text, at)):
                ahead += state.to
        return seen

    def _new(self, test: Test | None = None, anchor: str = "") -> int:
        if len(self._states) >= _MOST_STATES:
            raise TooComplex("has too many repetitions")
        self._states.append(_State(test, anchor))
        return len(self._states) - 1

    def _link(self, start: int, end: int) -> None:
        self._states[start].to.append(end)

    def _sequence(self, items: Any, start: int) -> int:
        for operation, argument in items:
            start = self._item(operation, argument, start)
        return start

    def _item(self, operation: Any, argument: Any, start: int) -> int:
        if operation is _sre.SUBPATTERN:
            _, flags, off, inner = argument
            if flags or off:
                raise TooComplex("has flags")
            return self._sequence(inner, start)
        if operation is _sre.BRANCH:
            end = self._new()
            for branch in argument[1]:
                first = self._new()
                self._link(start, first)
                self._link(self._sequence(branch, first), end)
            return end
        if operation in (_sre.MAX_REPEAT, _sre.MIN_REPEAT):
            return self._repeated(start, *argument)
        if operation is _sre.AT:
            return self._step(start, anchor=_anchor(argument))
        return self._step(start, test=_test(operation, argument))

    def _step(self, start: int, test: Test | None = None, anchor: str = "") -> int:
        at, end = self._new(test, anchor), self._new()
        self._link(start, at)
        self._link(at, end)
        return end

    def _repeated(self, start: int, least: int, most: Any, inner: Any) -> int:
        for _ in range(least):
            start = self._sequence(inner, start)
        if most is _sre.MAXREPEAT:
            # Back to a state of its own: what comes before must not be entered again.
            hub = self._new()
            self._link(start, hub)
            first = self._new()
            self._link(hub, first)
            self._link(self._sequence(inner, first), hub)
            end = self._new()
            self._link(hub, end)
            return end
        end = self._new()
        self._link(start, end)
        for _ in range(most - least):
            start = self._sequence(inner, start)
            self._link(start, end)
        return end


def _holds(anchor: str, text: str, at: int) -> bool:
    if anchor == "start":
        return at == 0
    return at == len(text) or (at == len(text) - 1 and text[at] == "\n")


def _anchor(kind: Any) -> str:
    names = {_sre.AT_BEGINNING: "start", _sre.AT_BEGINNING_STRING: "start", _sre.AT_END: "end"}
    if kind not in names:
        raise TooComplex("has an anchor other than ^ and $")
    return names[kind]


_CATEGORIES = {
    _sre.CATEGORY_DIGIT: r"\d",
    _sre.CATEGORY_NOT_DIGIT: r"\D",
    _sre.CATEGORY_SPACE: r"\s",
    _sre.CATEGORY_NOT_SPACE: r"\S",
    _sre.CATEGORY_WORD: r"\w",
    _sre.CATEGORY_NOT_WORD: r"\W",
}


def _test(operation: Any, argument: Any) -> Test:
    if operation is _sre.LITERAL:
        return chr(argument).__eq__
    if operation is _sre.NOT_LITERAL:
        return chr(argument).__ne__
    if operation is _sre.ANY:
        return "\n".__ne__
    if operation is _sre.RANGE:
        low, high = argument
        return lambda character: low <= ord(character) <= high
    if operation is _sre.CATEGORY:
        known = re.compile(_CATEGORIES[argument])
        return lambda character: known.match(character) is not None
    if operation is _sre.IN:
        wanted = not argument or argument[0][0] is not _sre.NEGATE
        tests = [_test(*part) for part in argument if part[0] is not _sre.NEGATE]
        return lambda character: any(test(character) for test in tests) is wanted
    raise TooComplex(f"has a part that is not followed ({operation})")


# Plain names, dots, digits: nothing in them is repeated, so that Python's own engine can't explode, and it is faster.
_PLAIN = re.compile(r"(?:[\w^.-]|\\[.\dd_-])*")


@lru_cache(maxsize=4096)
def compiled(pattern: str, around: str = "{}") -> Pattern | re.Pattern[str]:
    """A pattern from a config, put in the place of ``{}`` in one of ours.

    Raises:
        re.error: it is no regular expression.
        TooComplex: it is one that this engine does not follow.
    """
    whole = around.format(pattern)
    return re.compile(whole) if _PLAIN.fullmatch(pattern) else Pattern(whole)


def matches(pattern: Pattern | re.Pattern[str], text: str) -> bool:
    """Whether the pattern matches from the beginning of ``text``, as ``re.match`` has it."""
    return pattern.matches(text) if isinstance(pattern, Pattern) else pattern.match(text) is not None
