"""The tuners of `regraft.tuners` in PEFT's folders: their keys and what they mean.

- LORAX: ``lorax_sigma``, (r,) or (r, r), on the leading singular directions of the weight as it is stored, and
  ``lorax_print`` (16,), which tells the base; ``lorax_marks`` (r, 4) tells the directions' signs to a matrix.
  ``lorax_u`` and ``lorax_v`` where ``store_bases`` is set.
- SVDIFF: ``svdiff_delta``, one number per singular value, or per element of a weight of one dimension, and
  ``svdiff_print`` (8,).
- FOURA: ``foura_a`` and ``foura_b``, of ``fft`` with a last dimension of 2 and with ``foura_size``, (out, in); scale =
  foura_alpha / r. ``foura_mask`` is a fixed gate; ``foura_gate`` and ``foura_usage`` belong to one that depends on the
  input. ``conv1d_modules`` of the config names the modules whose weight is (in, out).

No key ends in ``.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from regraft.errors import InputError
from regraft.formats import AdapterFile
from regraft.formats._common import check_float
from regraft.formats._peft_config import Config, check_numbers
from regraft.tensors import InMemory, TensorRef
from regraft.updates import Foura, SpectralShift, Subspace, Update
from regraft.updates._kind import scaled_ref
from regraft.updates.checks import mismatch

#: peft_type → kind of update.
TUNERS: dict[str, type[Any]] = {"LORAX": Subspace, "SVDIFF": SpectralShift, "FOURA": Foura}
#: A regular expression of all parts.
PARTS = r"lorax_(?:sigma|u|v|print|marks)|svdiff_(?:delta|print)|foura_(?:a|b|gate|usage|mask|size)"
_DAMAGED = "The file is damaged: get another one."


def build_tuner(kind: str, path: str, parts: Mapping[str, str], file: AdapterFile) -> Update:
    """The update of one module.

    Args:
        kind: one of `TUNERS`.
        path: of the module.
        parts: part (``lorax_sigma``) → key.
        file: that holds the keys.

    Raises:
        InputError: a part is missing, of a wrong dtype or shape, or the change is no matrix.
    """
    held: dict[str, TensorRef] = {}
    for part, key in parts.items():
        held[part.partition("_")[2]] = file.tensors[key]
        if part != "foura_size":
            check_float(file.tensors[key], file.path, key)
    first = next(iter(parts.values()))
    if "gate" in held:
        what = "is of a gate that depends on the input: such a change is no matrix"
        remedy = "Fix the mask with FouraModel.freeze_gate, and save it again."
        raise InputError(what, file=file.path, key=parts["foura_gate"], remedy=remedy)
    for part in {"LORAX": ("sigma",), "SVDIFF": ("delta",), "FOURA": ("a", "b")}[kind]:
        if part not in held:
            what = f"has no matching {kind.lower()}_{part} tensor: the update is incomplete"
            raise InputError(what, file=file.path, key=first, remedy=_DAMAGED)
    update: Update
    if kind == "LORAX":
        if ("u" in held) != ("v" in held):
            what = "has only one of lorax_u and lorax_v: the update is incomplete"
            raise InputError(what, file=file.path, key=first, remedy=_DAMAGED)
        update = Subspace(held["sigma"], held.get("u"), held.get("v"), held.get("print"), held.get("marks"))
    elif kind == "SVDIFF":
        update = SpectralShift(held["delta"], stamp=held.get("print"))
    else:
        update = _foura(path, held, parts, file)
    wrong = mismatch(update)
    if wrong is not None:
        raise InputError(f"its {wrong[0]} {wrong[1]}", file=file.path, key=first, remedy=_DAMAGED)
    return update


def _foura(path: str, held: Mapping[str, TensorRef], parts: Mapping[str, str], file: AdapterFile) -> Foura:
    config = file.config or {}
    size = None
    if "size" in held:
        ref = held["size"]
        values = ref.load().tolist() if ref.shape == (2,) and not ref.dtype.is_floating_point else []
        if len(values) != 2 or min(values) < 1:
            what = "must be two whole numbers above 0"
            raise InputError(what, file=file.path, key=parts["foura_size"], remedy=_DAMAGED)
        size = (int(values[0]), int(values[1]))
    turned = path in (config.get("conv1d_modules") or ())
    rank = (*held["b"].shape, 0)[1] or 1
    scale = float(config["foura_alpha"]) / rank if config else 1.0
    return Foura(held["a"], held["b"], scale, held.get("mask"), size, "conv1d" if turned else "weight")


def check_tuner_config(config: Config, kind: str, file: Path) -> None:
    """Make sure that what `build_tuner` reads out of a config is there.

    Raises:
        InputError: a field is missing, no number or no list.
    """
    if kind != "FOURA":
        return
    check_numbers(config, ("r", "foura_alpha"), file)
    named = config.get("conv1d_modules")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        remedy = "Give the config that was saved with these weights."
        raise InputError("must be a list of names", file=file, key="conv1d_modules", remedy=remedy)


def tuner_parts(update: Subspace | SpectralShift | Foura) -> dict[str, TensorRef]:
    """Part → tensor, as PEFT's folder has them."""
    found: dict[str, TensorRef | None]
    if isinstance(update, Subspace):
        found = {"sigma": update.sigma, "u": update.u, "v": update.v, "print": update.stamp, "marks": update.marks}
        start = "lorax"
    elif isinstance(update, SpectralShift):
        # relu(σ + s · δ): the strength can stand in δ.
        shift = update.shift if update.scale == 1.0 else scaled_ref(update.shift, update.scale)
        found, start = {"delta": shift, "print": update.stamp}, "svdiff"
    else:
        size = None if update.size is None else InMemory(torch.tensor(update.size))
        found, start = {"a": update.a, "b": update.b, "mask": update.mask, "size": size}, "foura"
    return {f"{start}_{part}": ref for part, ref in found.items() if ref is not None}
