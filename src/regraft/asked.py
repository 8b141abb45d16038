"""What people ask for, in the words of the command line and of a manifest's cells, as values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from regraft.adapter import Adapter
from regraft.carry import matches
from regraft.errors import UsageError
from regraft.families import block_names
from regraft.methods import get_method
from regraft.methods.task import Rank, Running
from regraft.plan import Selection

_UNITS = {"s": 1, "m": 60, "h": 3600}

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def dtype(name: str, option: str = "--dtype") -> torch.dtype:
    """A dtype by the name that people type."""
    if name not in DTYPES:
        raise UsageError(f"{option} {name!r} is not known", remedy=f"Known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def number_or_share(text: str | None, option: str) -> int | float | None:
    """``32`` → 32; ``0.9`` → 0.9; ``keep`` or nothing → None."""
    if text is None or text == "keep":
        return None
    try:
        number: int | float = int(text) if text.isdigit() else float(text)
    except ValueError:
        number = -1
    if not number > 0 or (isinstance(number, float) and number > 1):
        raise UsageError(f"{option} {text!r} is neither a rank nor a share", remedy="Give 16, 0.9 or keep.")
    return number


def wanted_rank(text: str | None) -> Rank:
    """The rank of the output: as `number_or_share`, or ``full``."""
    return "full" if text == "full" else number_or_share(text, "--rank")


def pull(text: str | None) -> float | str | None:
    """``auto``, or how far to pull, 0 to 1."""
    if text is None or text == "auto":
        return text
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise UsageError(f"--pull {text!r} is out of range", remedy="Give 0 to 1, or auto.")
    return number


def running(
    n_inputs: int | None, seed: int, prompts: Path | None, config: Path | None, device: str, weights_only: bool
) -> Running:
    """How both models are to be run."""
    return Running(n_inputs, seed, texts(prompts), config, device, weights_only)


def texts(prompts: Path | None) -> tuple[str, ...] | None:
    """The lines of a file of prompts."""
    if prompts is None:
        return None
    from regraft.probes import read_prompts

    return tuple(read_prompts(prompts))


def number_or_word(text: str | None, option: str, word: str) -> float | str | None:
    """``0.8`` → 0.8; the word itself; nothing → None."""
    if text is None or text == word:
        return text
    try:
        return finite(float(text), option)
    except ValueError:
        raise UsageError(f"{option} {text!r} is neither a number nor {word!r}", remedy=f"Give 0.8 or {word}.") from None


def finite(number: float, option: str) -> float:
    """``number``, or a usage error where it is no factor that can be applied."""
    if not isfinite(number):
        raise UsageError(f"{option} {number} is no number", remedy="Give one such as 0.8.")
    return number


def above_zero(number: float, option: str) -> float:
    """``number``, or a usage error where it is not above 0."""
    if not finite(number, option) > 0:
        raise UsageError(f"{option} {number} is out of range", remedy="Give a number above 0.")
    return number


def at_least_zero(number: float, option: str) -> float:
    """``number``, or a usage error where it is below 0."""
    if not finite(number, option) >= 0:
        raise UsageError(f"{option} {number} is out of range", remedy="Give 0 or more.")
    return number


def share(number: float, option: str) -> float:
    """``number``, or a usage error where it is no share of 1."""
    if not 0 <= finite(number, option) <= 1:
        raise UsageError(f"{option} {number} is out of range", remedy="Give 0 to 1.")
    return number


def one_of(word: str, option: str, known: Sequence[str]) -> Any:
    """``word``, or a usage error where it is none of the known ones."""
    if word not in known:
        raise UsageError(f"{option} {word!r} is not known", remedy=f"Known: {', '.join(known)}.")
    return word


def method_options(method: str, **given: Any) -> dict[str, Any]:
    """The options that were given, checked against what the method has."""
    options = {name: value for name, value in given.items() if value is not None}
    # The removed blocks' policy is every method's.
    get_method(method).check_options({name: value for name, value in options.items() if name != "removed"})
    return options


def selection(include: list[str] | None, exclude: list[str] | None, components: list[str] | None) -> Selection:
    """A `Selection` from repeated or comma-separated options."""

    def split(values: list[str] | None) -> tuple[str, ...]:
        return tuple(part for value in values or () for part in value.split(",") if part)

    return Selection(split(include), split(exclude), split(components))


def block_strengths(text: str | None, adapter: Adapter) -> tuple[tuple[str, float], ...]:
    """``1,0.5,…`` (one number per block, as block-weight tools have it), or ``GLOB=FACTOR,…``.

    Raises:
        UsageError: neither, or the family has no such number of blocks.
    """
    if not text:
        return ()
    try:
        if "=" in text:
            pairs = [part.rsplit("=", 1) for part in text.split(",")]
            given = tuple((glob.strip(), finite(float(factor), "--block-strength")) for glob, factor in pairs)
            return _that_match(given, adapter)
        factors = [finite(float(part), "--block-strength") for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--block-strength {text!r} can't be read", remedy="Give 1,0.5,… or IN04=0.5,*attn2*=0."
        ) from None
    names = block_names(adapter.family, len(factors))
    if names is None:
        raise UsageError(
            f"--block-strength with {len(factors)} numbers does not fit family {adapter.family or 'unknown'}",
            remedy="SD 1.5 takes 17 or 26, SDXL 12 or 20; any family takes GLOB=FACTOR,….",
        )
    return tuple(zip(names, factors, strict=True))


def _that_match(given: tuple[tuple[str, float], ...], adapter: Adapter) -> tuple[tuple[str, float], ...]:
    """The same, or a usage error that names the first glob that matches no module or block."""
    for glob, _ in given:
        if not any(matches(glob, ref, adapter.family) for ref in adapter.updates):
            some = str(next(iter(adapter.updates), "none"))
            remedy = f"Modules are named like {some}."
            raise UsageError(f"--block-strength: {glob!r} matches no module or block of the adapter", remedy=remedy)
    return given


def seconds(text: str | None, flag: str = "--budget") -> float | None:
    """``90`` → 90; ``10m`` → 600; ``2h`` → 7200.

    Raises:
        UsageError: it is neither.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"{flag} {text!r} is no time", remedy="Give seconds, 10m or 2h.")
    return float(found[1]) * _UNITS[found[2] or "s"]
