"""PEFT's LoRA config: per-module rank and alpha by patterns, and a config corrected to what an adapter now holds.

Diffusers keeps the same fields per component in its header, so that both formats share this file.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from regraft.errors import InputError, shortened
from regraft.patterns import Pattern, TooComplex, compiled, matches
from regraft.updates import LowRank

Config = Mapping[str, Any]

_ANOTHER = "Give the config that was saved with these weights."
# What PEFT needs to load a LoRA; every field that is left out takes PEFT's own default.
MINIMAL: Config = {
    "peft_type": "LORA",
    "task_type": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": None,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
}
# QA-LoRA's groups are those of the quantisation: 16 by PEFT's default, 32 to 128 as a rule.
_POOLED, _MOST_POOLED = 16, 4096
# Fields that mean the same for every tuner.
_OF_ANY_KIND = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "modules_to_save",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
# The weights of these heads are (out, in) even in a model whose blocks are Conv1D.
_LINEAR_HEADS = ("lm_head", "score", "classifier", "qa_outputs", "summary")


def _compiled(pattern: str) -> Pattern | re.Pattern[str]:
    # The rule of peft.utils.other.get_pattern_key (0.21): a whole name, or the end of one after a dot.
    return compiled(pattern, around=r"(.*\.)?({})$")


def orientation_of(path: str, config: Config | None) -> Literal["weight", "conv1d"]:
    """How the base stores the weight of a linear layer: GPT-2's Conv1D has (in, out)."""
    turned = bool((config or {}).get("fan_in_fan_out")) and path.rpartition(".")[2] not in _LINEAR_HEADS
    return "conv1d" if turned else "weight"


def pooled_of(config: Config | None) -> int | None:
    """How many inputs QA-LoRA pools into one before A reads them; None for any other LoRA."""
    return int(config.get("qalora_group_size", _POOLED)) if config and config.get("use_qalora") else None


def by_pattern(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """The value of the first pattern that matches a module's name, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if matches(_compiled(pattern), path):
            return value
    return default


def alpha_of(config: Config, path: str) -> float:
    """The alpha that a config gives to a module."""
    return by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])


def scale_of(config: Config, path: str, rank: int) -> float:
    """The factor of B A: alpha / r, or alpha / √r with rsLoRA; r is the tensor's own."""
    return alpha_of(config, path) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def implied_alpha(update: LowRank, *, rslora: bool) -> float:
    """The alpha by which PEFT's rule gives the update's scale; a whole number is given back as one."""
    alpha = update.scale * (math.sqrt(update.rank) if rslora else update.rank)
    near = round(alpha)
    return near if near and math.isclose(alpha, near, rel_tol=1e-9) else alpha


def check_config(config: Config, file: Path, prefix: str = "") -> None:
    """Make sure that rank and alpha can be read out of a LoRA config.

    Raises:
        InputError: ``r`` or ``lora_alpha`` is missing or no number, a pattern is no regular expression, a list of
            names is none, or QA-LoRA's groups have no size.
    """
    check_numbers(config, ("r", "lora_alpha"), file, prefix)
    if config.get("use_qalora"):
        group, key = config.get("qalora_group_size", _POOLED), f"{prefix}qalora_group_size"
        if not isinstance(group, int) or isinstance(group, bool) or not 0 < group <= _MOST_POOLED:
            what = f"must be a whole number of at most {_MOST_POOLED}, not {_told(group)}"
            raise InputError(what, file=file, key=key, remedy=_ANOTHER)
    wrapped = config.get("target_parameters")
    if wrapped is not None and not (isinstance(wrapped, list) and all(isinstance(name, str) for name in wrapped)):
        raise InputError("must be a list of names", file=file, key=f"{prefix}target_parameters", remedy=_ANOTHER)


def check_numbers(config: Config, fields: tuple[str, str], file: Path, prefix: str = "") -> None:
    """Make sure that a rank, an alpha and their patterns can be read out of a config.

    Args:
        config: of any tuner.
        fields: what it calls rank and alpha.
        file: for messages.
        prefix: likewise, before a field's name.

    Raises:
        InputError: one is missing or no number, or a pattern is no regular expression.
    """
    for name in fields:
        value = config.get(name)
        if not is_number(value):
            what = "is missing" if value is None else f"must be a number, not {_told(value)}"
            raise InputError(what, file=file, key=f"{prefix}{name}", remedy=_ANOTHER)
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        key = f"{prefix}{name}"
        if not isinstance(patterns, Mapping):
            raise InputError("must map module names to numbers", file=file, key=key, remedy=_ANOTHER)
        for pattern, value in patterns.items():
            if not is_number(value):
                what = f"{_told(pattern)} must have a number, not {_told(value)}"
                raise InputError(what, file=file, key=key, remedy=_ANOTHER)
            check_pattern(pattern, file, key)


def check_pattern(pattern: str, file: Path, key: str) -> None:
    """Make sure that a pattern of module names can be matched.

    Raises:
        InputError: it is no regular expression, or one that could take for ever.
    """
    try:
        _compiled(pattern)
    except re.error:
        what = f"{_told(pattern)} is no regular expression"
        raise InputError(what, file=file, key=key, remedy=_ANOTHER) from None
    except TooComplex as error:
        what = f"{_told(pattern)} {error}, which no module name needs"
        raise InputError(what, file=file, key=key, remedy=_ANOTHER) from None


def is_number(value: object) -> bool:
    """Whether it is a finite number that a factor can be made of."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # JSON's whole numbers have no end, and floats do.
    return abs(value) < 1 << 1023 if isinstance(value, int) else math.isfinite(value)


def _told(value: object) -> str:
    return shortened(
        repr(value) if not isinstance(value, int) or abs(value) < 1 << 1023 else "one beyond all floats", 120
    )


def corrected(config: Config, updates: Mapping[str, LowRank], *, keep_targets: bool) -> dict[str, Any]:
    """The config, true for these updates: rank and alpha per module, targets, DoRA and bias.

    Every field that is right already stays as it is.

    Args:
        config: the adapter's old config, or `MINIMAL`.
        updates: module path → update.
        keep_targets: the modules are those that the config was saved with.
    """
    result = dict(config)
    if not updates:
        return result
    rslora = bool(config.get("use_rslora"))
    alphas = {path: implied_alpha(update, rslora=rslora) for path, update in updates.items()}
    ranks = {path: update.rank for path, update in updates.items()}
    if not _agrees(config, ranks, alphas):
        result["r"], result["rank_pattern"] = _usual_and_rest(ranks)
        result["lora_alpha"], result["alpha_pattern"] = _usual_and_rest(alphas)
    if config.get("use_qalora"):
        # Its A was written out to all inputs as it was read.
        result["use_qalora"] = False
    result["use_dora"] = any(update.magnitude is not None for update in updates.values())
    if config.get("lora_bias") or any(update.bias is not None for update in updates.values()):
        result["lora_bias"] = any(update.bias is not None for update in updates.values())
    if not keep_targets:
        result["target_modules"] = sorted(updates)
        for narrowing in ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"):
            if result.get(narrowing) is not None:
                result[narrowing] = None
    return result


def _agrees(config: Config, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> bool:
    return all(
        by_pattern(config.get("rank_pattern"), path, config["r"]) == rank
        and math.isclose(alpha_of(config, path), alphas[path], rel_tol=1e-6)
        for path, rank in ranks.items()
    )


def _usual_and_rest(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {exactly(path): value for path, value in values.items() if value != usual}


def exactly(path: str) -> str:
    """A pattern for this module alone: ``^`` keeps it from matching the end of a longer name."""
    # In ``net.1.0`` a bare dot would match ``net.100`` too; elsewhere plain names are what people expect to read.
    return "^" + (re.escape(path) if re.search(r"\.\d+\.\d", path) else path)


def as_lora(config: Config | None) -> Config:
    """The config to begin a LoRA's from: the own one, or of another kind's what holds for any."""
    if config is None:
        return MINIMAL
    if str(config.get("peft_type") or "LORA").upper() == "LORA":
        return config
    return {**MINIMAL, **{name: config[name] for name in _OF_ANY_KIND if name in config}}


def with_saved(config: Config, modules: Iterable[str]) -> dict[str, Any]:
    """The config, with these modules among those that are stored whole."""
    saved = config.get("modules_to_save") or []
    more = sorted(path for path in modules if not is_matched(path, saved))
    return {**config, "modules_to_save": [*saved, *more]} if more else dict(config)


def is_matched(path: str, targets: Iterable[str]) -> bool:
    """Whether a list of ``target_modules`` names this module."""
    return any(path == target or path.endswith(f".{target}") for target in targets)
