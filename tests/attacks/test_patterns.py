"""The engine that can't explode says what Python's own says."""

from __future__ import annotations

import random
import re

import pytest

from regraft.patterns import Pattern, TooComplex, compiled, matches

ATOMS = ("a", "b", r"\.", ".", r"\d", r"\W", "[ab]", "[^a]", "[0-3]", r"[\w.]", "^", "$")
REPEATS = ("*", "+", "?", "{1,2}", "*?", "{2}", "{0}")


def pattern_of(dice: random.Random, depth: int) -> str:
    """A pattern at random, of all that the engine follows."""
    kind = dice.random()
    if depth == 0 or kind < 0.35:
        return dice.choice(ATOMS)
    if kind < 0.6:
        return pattern_of(dice, depth - 1) + pattern_of(dice, depth - 1)
    if kind < 0.75:
        return f"({pattern_of(dice, depth - 1)}|{pattern_of(dice, depth - 1)})"
    return f"(?:{pattern_of(dice, depth - 1)}){dice.choice(REPEATS)}"


def test_it_agrees_with_re_on_patterns_at_random() -> None:
    dice, compared = random.Random(0), 0
    for _ in range(1500):
        pattern = pattern_of(dice, 4)
        try:
            ours, theirs = Pattern(pattern), re.compile(pattern)
        except re.error:
            continue
        for _ in range(6):
            text = "".join(dice.choice("ab.01\n") for _ in range(dice.randrange(8)))
            assert ours.matches(text) == (theirs.match(text) is not None), (pattern, text)
            compared += 1
    assert compared > 5000


@pytest.mark.parametrize("pattern", [r"(a)\1", "(?=a)a", "(?<!a)b", "(?i)a", "(?i:a)", r"\ba", "a{1,100000}"])
def test_what_it_does_not_follow_is_refused(pattern: str) -> None:
    with pytest.raises(TooComplex):
        Pattern(pattern)


def test_plain_names_go_to_the_faster_engine() -> None:
    assert isinstance(compiled(r"^model\.layers\.0\.q_proj"), re.Pattern)
    assert isinstance(compiled("(q|k)_proj"), Pattern)
    assert matches(compiled("(q|k)_proj"), "q_proj")
    assert not matches(compiled("q_proj"), "k_proj")
