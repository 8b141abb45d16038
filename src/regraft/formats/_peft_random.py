"""PEFT's VeRA and FourierFT: numbers on fixed random directions, and what is needed to make these again.

Facts (peft 0.21.2):

- VERA: ``vera_lambda_b`` (out,) and ``vera_lambda_d`` (r,) per module; the file's one pair of projections lies outside
  of the model's names, in ``base_model.vera_A`` (r, most inputs) and ``base_model.vera_B`` (most outputs, r), or with
  ``save_projection`` off nowhere: they are drawn from ``projection_prng_key`` at the size of the largest module.
- FOURIERFT: ``fourierft_spectrum`` (n,) per module; ``scaling`` and ``random_loc_seed`` of the config are those of all,
  ``n_frequency_pattern`` looks modules up as ``rank_pattern`` does.
- A raw state dict has the adapter's name behind each: ``vera_A.default``. No key ends in ``.weight``.
- ``fan_in_fan_out`` (GPT-2's Conv1D): ΔW is transposed, as LoRA's.
- Neither tells how many inputs a module has: `regraft.updates.with_shapes` takes that from the base.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.errors import InputError, shortened
from regraft.formats import AdapterFile
from regraft.formats._common import check_float
from regraft.formats._factors import cannot_hold
from regraft.formats._peft_config import Config, by_pattern, check_pattern, is_number, orientation_of
from regraft.tensors import TensorRef
from regraft.updates import FourierFT, Update, Vera
from regraft.updates._views import cut, same
from regraft.updates.checks import mismatch
from regraft.updates.vera import HIGHEST_RANK, Seed

#: peft_type → kind of update.
RANDOM: dict[str, type[Any]] = {"VERA": Vera, "FOURIERFT": FourierFT}
#: A regular expression of all parts.
PARTS = r"vera_lambda_[bd]|fourierft_spectrum"

_PROJECTION = re.compile(r"(?:base_model\.)?vera_(?P<part>[AB])(?:\.(?P<name>[^.]+))?")
_DAMAGED = "The file is damaged: get another one."
_ANOTHER = "Give the config that was saved with these weights."


def split_projection(key: str) -> tuple[str, str] | None:
    """``A`` or ``B`` and the adapter's name, of a whole key; None for other keys."""
    found = _PROJECTION.fullmatch(key)
    return (found["part"], found["name"] or "") if found else None


def build_random(
    kind: str, path: str, parts: Mapping[str, str], projections: Mapping[str, str], modules: int, file: AdapterFile
) -> Update:
    """The update of one module.

    Args:
        kind: one of `RANDOM`.
        path: of the module.
        parts: part (``vera_lambda_b``) → key.
        projections: ``A`` and ``B`` → key, as far as the file has them.
        modules: how many of the kind the file has.
        file: that holds the keys.

    Raises:
        InputError: a part is missing, of a wrong dtype or shape, or not what the config says.
    """
    for key in parts.values():
        check_float(file.tensors[key], file.path, key)
    key = next(iter(parts.values()))
    vera = kind == "VERA"
    update = _vera(path, parts, projections, modules, file) if vera else _fourier(path, parts, file)
    wrong = mismatch(update)
    if wrong is not None:
        raise InputError(f"its {wrong[0]} {wrong[1]}", file=file.path, key=key, remedy=_DAMAGED)
    return update


def _vera(path: str, parts: Mapping[str, str], projections: Mapping[str, str], modules: int, file: AdapterFile) -> Vera:
    for part in ("vera_lambda_b", "vera_lambda_d"):
        if part not in parts:
            what = f"has no matching {part} tensor: the update is incomplete"
            raise InputError(what, file=file.path, key=next(iter(parts.values())), remedy=_DAMAGED)
    rank, stated = file.tensors[parts["vera_lambda_d"]].shape, (file.config or {}).get("r")
    if stated is not None and rank[:1] != (stated,):
        what = f"has shape {list(rank)}, but the config's r is {_told(stated)}"
        raise InputError(what, file=file.path, key=parts["vera_lambda_d"], remedy=_ANOTHER)
    lambda_b, lambda_d = file.tensors[parts["vera_lambda_b"]], file.tensors[parts["vera_lambda_d"]]
    if projections:
        for part in ("A", "B"):
            if part not in projections:
                what = f"has no matching vera_{part} tensor: one projection is missing"
                raise InputError(what, file=file.path, key=next(iter(projections.values())), remedy=_DAMAGED)
            check_float(file.tensors[projections[part]], file.path, projections[part])
        a, b = (file.tensors[projections[part]] for part in ("A", "B"))
        return Vera(lambda_b, lambda_d, a, b, orientation=orientation_of(path, file.config))
    if file.config is None or file.config.get("save_projection", True) or rank[0] > HIGHEST_RANK:
        what = "belongs to a VeRA whose projections vera_A and vera_B are not in the file"
        remedy = "Save it again with save_projection=True, or give the folder with its adapter_config.json."
        raise InputError(what, file=file.path, key=parts["vera_lambda_d"], remedy=remedy)
    seed = Seed(int(file.config.get("projection_prng_key", 0)), modules)
    return Vera(lambda_b, lambda_d, None, None, seed, orientation_of(path, file.config))


def _fourier(path: str, parts: Mapping[str, str], file: AdapterFile) -> FourierFT:
    key = parts["fourierft_spectrum"]
    if file.config is None:
        what = "is of a FourierFT adapter, whose scale and places stand in adapter_config.json: it is not there"
        raise InputError(what, file=file.path, key=key, remedy="Give the folder that it was saved in.")
    spectrum = file.tensors[key]
    wanted = int(by_pattern(file.config.get("n_frequency_pattern"), path, file.config["n_frequency"]))
    if spectrum.shape != (wanted,):
        what = f"has shape {list(spectrum.shape)}, but the config's n_frequency is {_told(wanted)}"
        raise InputError(what, file=file.path, key=key, remedy=_ANOTHER)
    scale, seed = float(file.config["scaling"]), file.config["random_loc_seed"]
    return FourierFT(spectrum, scale, seed, orientation_of(path, file.config))


def check_random_config(config: Config, kind: str, file: Path) -> None:
    """Make sure that what `build_random` reads out of a config is there.

    Raises:
        InputError: a field is missing, no number, or out of the range that PEFT takes.
    """
    if kind == "VERA":
        _check_count(config.get("r"), file, "r")
        _check_seed(config.get("projection_prng_key", 0), file, "projection_prng_key")
        return
    if not is_number(config.get("scaling")):
        raise InputError(_not("a number", config.get("scaling")), file=file, key="scaling", remedy=_ANOTHER)
    _check_seed(config.get("random_loc_seed"), file, "random_loc_seed")
    _check_count(config.get("n_frequency"), file, "n_frequency")
    pattern = config.get("n_frequency_pattern") or {}
    if not isinstance(pattern, Mapping):
        what = "must map module names to numbers"
        raise InputError(what, file=file, key="n_frequency_pattern", remedy=_ANOTHER)
    for name, value in pattern.items():
        _check_count(value, file, "n_frequency_pattern")
        check_pattern(name, file, "n_frequency_pattern")


def _check_count(value: object, file: Path, key: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise InputError(_not("a whole number above 0", value), file=file, key=key, remedy=_ANOTHER)


def _check_seed(value: object, file: Path, key: str) -> None:
    # What torch's generators take.
    if not isinstance(value, int) or isinstance(value, bool) or not -(1 << 63) <= value < 1 << 64:
        raise InputError(_not("a whole number of 64 bits", value), file=file, key=key, remedy=_ANOTHER)


def _not(wanted: str, value: object) -> str:
    return "is missing" if value is None else f"must be {wanted}, not {_told(value)}"


def _told(value: object) -> str:
    # Python refuses to spell out whole numbers of more than 4300 digits.
    long = isinstance(value, int) and abs(value) >= 1 << 64
    return "one beyond 64 bits" if long else shortened(repr(value), 120)


def random_parts(update: Vera | FourierFT) -> dict[str, TensorRef]:
    """Part → tensor, as PEFT's folder has them for one module."""
    if isinstance(update, FourierFT):
        return {"fourierft_spectrum": update.spectrum}
    return {"vera_lambda_b": update.lambda_b, "vera_lambda_d": update.lambda_d}


def shared_projections(updates: Mapping[str, Update]) -> dict[str, TensorRef]:
    """``A`` and ``B`` of the VeRA updates of one file, of the size that PEFT gives them; nothing where PEFT draws them.

    Raises:
        OutputError: the updates don't share them.
    """
    found = {path: update for path, update in updates.items() if isinstance(update, Vera)}
    first = next(iter(found.values()), None)
    if first is None:
        return {}
    for path, update in found.items():
        alike = update.seed == first.seed and same(update.a, first.a) and same(update.b, first.b)
        if not alike or update.rank != first.rank:
            raise cannot_hold("PEFT", "VeRA updates of several projections: one file has one pair", path)
    known = all(update.weight_shape is not None for update in found.values())
    whole = first.seed is not None and len(found) == first.seed.modules
    if first.a is None or first.b is None:
        if whole:
            return {}
        what = "some of the modules of a VeRA whose projections are not stored"
        raise cannot_hold("PEFT", what, next(iter(found)), "Name its base: the projections are drawn by that.")
    out = max(update.lambda_b.shape[0] for update in found.values())
    into = max(update.sides()[1] for update in found.values()) if known else first.a.shape[1]
    if whole and (into, out) == (first.a.shape[1], first.b.shape[0]):
        return {}
    # PEFT makes room for the largest module that there is, and takes projections of that very size.
    return {"A": cut(first.a, [(0, into)], 1), "B": cut(first.b, [(0, out)])}


def corrected_random(config: dict[str, Any], kind: str, updates: Mapping[str, Update]) -> dict[str, Any]:
    """Fields of a config that are true for these updates, all of one of `RANDOM`; those that are right stay.

    Raises:
        OutputError: one config can't say what they are.
    """
    known = {path: update for path, update in updates.items() if isinstance(update, Vera | FourierFT)}
    if any(orientation_of(path, config) != update.orientation for path, update in known.items()):
        config["fan_in_fan_out"] = any(update.orientation == "conv1d" for update in known.values())
    for path, update in known.items():
        if orientation_of(path, config) != update.orientation:
            raise cannot_hold("PEFT", f"{update.kind} updates of Conv1D beside those of linear layers", path)
    if kind == "VERA":
        config["r"] = next(iter(updates.values())).rank
        config["save_projection"] = bool(shared_projections(updates))
        return config
    found = {path: update for path, update in updates.items() if isinstance(update, FourierFT)}
    if len({(update.scale, update.seed) for update in found.values()}) > 1:
        raise cannot_hold("PEFT", "FourierFT updates of several scales or seeds", list(found)[-1])
    first = next(iter(found.values()))
    if config.get("scaling") != first.scale:
        config["scaling"] = first.scale
    config["random_loc_seed"] = first.seed
    counts = {path: update.spectrum.shape[0] for path, update in found.items()}
    usual = Counter(counts.values()).most_common(1)[0][0]
    stated = config.get("n_frequency_pattern"), config.get("n_frequency", usual)
    if any(by_pattern(stated[0], path, stated[1]) != count for path, count in counts.items()) or stated[1] is None:
        config["n_frequency_pattern"] = {path: count for path, count in counts.items() if count != usual}
        config["n_frequency"] = usual
    return {"n_frequency": usual} | config
