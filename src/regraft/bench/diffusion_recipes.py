"""How the diffusion world's bases and adapters are made: what is trained, on which pictures, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from regraft.bench.tuners import Tuner


@dataclass(frozen=True)
class BaseRecipe:
    """How a base is made from the demo's v1.

    Attributes:
        text: the text encoder is trained too.
        data: the sets of pictures, in equal shares.
        distil: weight of v1's own prediction and block outputs as further aims.
    """

    change: Literal["none", "pruned", "deepened"]
    steps: int
    rate: float
    seed: int
    text: bool = False
    data: tuple[str, ...] = ("noto",)
    distil: float = 0.0


@dataclass(frozen=True)
class AdapterRecipe:
    """How an adapter is made on any base: with the same pictures and the same budget.

    Attributes:
        look: the style of `diffusion_art.LOOKS`; None is the few-step adapter.
        targets: ends of module names, as PEFT takes them.
    """

    look: str | None
    rank: int
    targets: tuple[str, ...]
    dora: bool = False
    steps: int = 300
    rate: float = 8e-3


@dataclass(frozen=True)
class TunerRecipe(Tuner, AdapterRecipe):
    """The recipe of an adapter of another kind than LoRA."""


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED = ("ff.net.0.proj", "ff.net.2")
PROJECTIONS = ("proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut")

BASES = {
    "near-1": BaseRecipe("none", steps=250, rate=1e-3, seed=31),
    "near-2": BaseRecipe("none", steps=500, rate=1.5e-3, seed=32, text=True),
    "pruned": BaseRecipe("pruned", steps=500, rate=1e-3, seed=33, data=("fluent", "noto"), distil=0.5),
    "grown": BaseRecipe("deepened", steps=300, rate=1e-3, seed=34),
}

ADAPTERS: dict[str, AdapterRecipe] = {
    "cyano": AdapterRecipe("cyano", 8, (*ATTENTION, *FEED, *PROJECTIONS), steps=600),
    "woodcut": AdapterRecipe("woodcut", 4, (*ATTENTION, *FEED)),
    "riso-dora": AdapterRecipe("riso", 4, (*ATTENTION, *FEED), dora=True),
    "blueprint-conv": AdapterRecipe("blueprint", 4, (*ATTENTION, *CONVOLUTIONS)),
    "few-step": AdapterRecipe(None, 8, (*ATTENTION, *FEED, *PROJECTIONS), steps=200, rate=4e-3),
    "amber": AdapterRecipe("amber", 8, (*ATTENTION, *FEED, *PROJECTIONS)),
}
"""*amber* is for development: methods may be tuned on it, and its figures are not reported."""

# The kinds that are made to be carried over, each in one look with the budget of the LoRA among them. Each rate is the
# best of two to four, by factors of two, on amber with seed 100.
_TUNERS = {
    "lora": ("lora", 8e-3, {"r": 8, "lora_alpha": 8}),
    "dora": ("dora", 8e-3, {"r": 8, "lora_alpha": 8}),
    "foura": ("foura", 8e-3, {"r": 8, "foura_alpha": 8}),
    "svdiff": ("svdiff", 1e-1, {}),
    "lorax": ("lorax", 2e-1, {}),
    "lorax-r8": ("lorax", 1e-1, {"r": 8, "full": True}),
}
ADAPTERS |= {
    f"{look}-{name}": TunerRecipe(
        look,
        8,
        (*ATTENTION, *FEED, *PROJECTIONS),
        steps=240,
        rate=rate,
        kind=kind,
        options=tuple(options.items()),
    )
    for look in ("cyano", "amber")
    for name, (kind, rate, options) in _TUNERS.items()
}
