"""What the configurations of all three tuners have in common: which modules are changed, and what else is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig


@dataclass
class TunerConfig(PeftConfig):
    """Options with PEFT's own names and meanings.

    Args:
        target_modules: names of modules, their ends, or one regular expression; ``all-linear`` for every linear layer.
        exclude_modules: names, ends or an expression of modules to leave out.
        bias: ``none``, ``all`` or ``<tuner>_only``: which biases are trained too, and stored whole.
        modules_to_save: further modules that are trained and stored whole, such as a new head.
        layers_to_transform: numbers of the layers to change; all by default.
        layers_pattern: name of the list of layers that those numbers count in.
    """

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to change."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    bias: str = field(default="none", metadata={"help": "Which biases are trained too."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules stored whole."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of the layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: it names the list that those numbers count in")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform can't be used where target_modules is one regular expression")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Make sure that an option is a whole number of at least ``least``.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_number(name: str, value: object, low: float, high: float = math.inf, *, open: bool = True) -> None:
    """Make sure that an option is a finite number between two, the lower one left out where ``open``.

    Raises:
        ValueError: it is not.
    """
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not (low < value if open else low <= value) or value > high:  # type: ignore[operator]
        end = f" and at most {high:g}" if math.isfinite(high) else ""
        raise ValueError(f"{name} must be a number {'above' if open else 'of at least'} {low:g}{end}, not {value!r}")


def check_one_of(name: str, value: object, *choices: str) -> None:
    """Make sure that an option is one of a few words.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_pattern_of(name: str, value: Any, option: str) -> None:
    """Make sure that a pattern of module names gives whole numbers.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name} must map module names to numbers, not {value!r}")
    for key, number in value.items():
        check_whole(f"{option} of {key} in {name}", number)
