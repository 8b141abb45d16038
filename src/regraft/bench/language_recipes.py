"""The language models' table: bases, adapters and pairs. Facts alone; `regraft.bench.language` reads them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from regraft.bench.language_models import Size, deepened, new_model, pruned, widened
from regraft.bench.language_train import AdapterRecipe, Course, TunerRecipe
from regraft.bench.worlds import PairSpec

OLD = "v1"
#: What v1 learns, and what every later base learns beside it: retention is measured on it.
FIRST, THIRD = ("python", "news"), "films"
MIX = (*FIRST, THIRD)


@dataclass(frozen=True)
class BaseRecipe:
    """How a base is made.

    Attributes:
        course: its training.
        domains: the texts that it learns, in equal parts.
        made: from v1, what training starts with; None is a new model of ``size``.
        size: of a new model.
        tokens: 0 is the tokenizer of characters; else one of so many merged pairs, learnt on ``domains``.
        distilled: whether v1's distribution is learnt, too.
    """

    course: Course
    domains: tuple[str, ...] = MIX
    made: partial[Any] | None = None
    size: Size | None = None
    tokens: int = 0
    distilled: bool = False

    @property
    def digest(self) -> str:
        """What tells this recipe from any other; two of the same make the same bytes."""
        made = self.made and (self.made.func.__name__, self.made.args, sorted(self.made.keywords.items()))
        return digest(self.course, self.domains, made, self.size, self.tokens, self.distilled)


def digest(*facts: object) -> str:
    """A short name for some facts."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


def as_it_is(model: Any) -> Any:
    """Training alone makes the difference."""
    return model


BASES = {
    "v1": BaseRecipe(Course(2000, 3e-3), FIRST, size=Size()),
    "drift-1": BaseRecipe(Course(150, 1.3e-3), made=partial(as_it_is)),
    "drift-2": BaseRecipe(Course(600, 3e-3), made=partial(as_it_is)),
    "drift-3": BaseRecipe(Course(900, 6e-3), made=partial(as_it_is)),
    "pruned": BaseRecipe(Course(350, 1e-3), made=partial(pruned, removed=(2, 4)), distilled=True),
    "wider": BaseRecipe(Course(250, 1e-3), made=partial(widened, channels=48, heads=2, units=128, seed=0)),
    "deeper": BaseRecipe(Course(250, 1e-3), made=partial(deepened, copied=(2, 4))),
    "scratch": BaseRecipe(Course(1300, 3e-3), size=Size(width=120, layers=4, mlp=336, heads=5)),
    "tokenizer": BaseRecipe(Course(500, 2e-3), made=partial(as_it_is), tokens=512),
}

ADAPTERS: dict[str, AdapterRecipe] = {
    "js": AdapterRecipe("js", 8),
    "c": AdapterRecipe("c", 16),
    "tweets": AdapterRecipe("tweets", 4, ("q_proj", "v_proj")),
    "reviews-dora": AdapterRecipe("reviews", 8, dora=True),
    # Of another nature: nothing new is learnt but another way to write it.
    "capitals": AdapterRecipe("capitals", 4, ("gate_proj", "up_proj", "down_proj")),
    "dev-web": AdapterRecipe("dev-web", 8, course=Course(200, 5e-3, batch=8)),
    "dev-po": AdapterRecipe("dev-po", 8, course=Course(200, 5e-3, batch=8)),
}
# The kinds that are made to be carried over, on the text and with the budget of `js`, a LoRA of rank 8. Each rate is
# the best of two to five, by factors of two or three, on dev-web with seed 100.
_TUNERS = {
    "dora": ("dora", 5e-3, {"r": 8, "lora_alpha": 16}),
    "foura": ("foura", 1e-2, {"r": 8, "foura_alpha": 16}),
    "svdiff": ("svdiff", 2e-1, {}),
    "lorax": ("lorax", 2e-1, {}),
    "lorax-r8": ("lorax", 1e-1, {"r": 8, "full": True}),
}
ADAPTERS |= {
    f"{domain}-{name}": TunerRecipe(
        domain, 8, course=Course(steps, rate, batch=8), kind=kind, options=tuple(options.items())
    )
    for domain, steps in (("js", 120), ("dev-web", 120))
    for name, (kind, rate, options) in _TUNERS.items()
}
#: Adapters that methods are tuned with, under seeds from `DEV_SEED` on; no reported figure rests on them.
DEV, DEV_SEED = tuple(name for name in ADAPTERS if name.startswith("dev-")), 100
DEV_PAIRS = ("lm-drift-1", "lm-drift-2", "lm-drift-3", "lm-scratch")

_THREE = ("js", "c", "reviews-dora")
_FIRST, _SECOND = (*_THREE, "tweets"), (*_THREE, "capitals")


def _pair(
    relation: Literal["drift", "pruned", "wider", "deeper", "scratch", "tokenizer"],
    expects: Literal["near", "strong", "pruned", "grown", "far"],
    about: str,
    adapters: tuple[str, ...],
    *,
    degree: str = "",
    seeds: tuple[int, ...] = (0,),
) -> PairSpec:
    return PairSpec(f"lm-{relation}{degree}", "language", relation, expects, about, adapters, seeds)


PAIRS = (
    _pair("drift", "near", "v1 trained on for a while, with a third domain", _FIRST, degree="-1"),
    # A copy keeps about 0.8 of the gain here, and 0.55 on the next: "strong" is where a copy leaves room to do better.
    _pair("drift", "near", "v1 trained on for longer, with a third domain", _THREE, degree="-2", seeds=(0, 1, 2)),
    _pair("drift", "strong", "v1 trained on for longest, with a third domain", _SECOND, degree="-3"),
    _pair(
        "pruned",
        "pruned",
        "two of v1's six blocks removed, then healed with v1 as teacher and a third domain",
        _THREE,
        seeds=(0, 1, 2),
    ),
    _pair("wider", "grown", "half of v1's channels, heads and MLP units copied (Net2Net), then trained on", _SECOND),
    _pair("deeper", "grown", "two of v1's six blocks copied behind themselves, then trained on", _FIRST),
    _pair("scratch", "far", "another width and depth, trained from scratch on v1's domains and a third", _SECOND),
    _pair("tokenizer", "strong", "v1's blocks under 512 merged pairs in place of characters, trained on", _FIRST),
)


def start_of(recipe: BaseRecipe, old: Any) -> Any:
    """The model that a base's training begins with; ``old`` is a copy of v1, or None."""
    if recipe.made is not None:
        return recipe.made(old)
    assert recipe.size is not None
    return new_model(recipe.size, seed=0)
