"""What follows a module's name in a key: which part of an update it is, in the spellings of every tool.

Facts, beside those in the formats' own files: LyCORIS 3.2 and 4.1 (``hada_``, ``lokr_``, ``oft_blocks``, ``a1`` …
``b2``, ``diff``, ``w_norm``), ComfyUI 0.3.64 (``diff``, ``diff_b``, ``set_weight``, ``lora_mid``, and every spelling of
the pair), OneTrainer (``dora_scale`` beside ``lora_A``), Mochi's trainer (``lora_A`` without ``.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from regraft.errors import InputError
from regraft.formats import AdapterFile
from regraft.formats._common import Parts, check_float
from regraft.formats._factors import flat
from regraft.tensors import TensorRef
from regraft.updates import Boft, Diff, Full, GLora, Ia3, LoHa, LoKr, LowRank, Oft, Tucker, Update
from regraft.updates.checks import mismatch


class Suffix(NamedTuple):
    """The role of a tensor in its update, and the spelling that it is written in."""

    role: str
    style: str


#: Spelling of the pair → suffixes of (down, up), with their separator.
PAIRS: Mapping[str, tuple[str, str]] = {
    "lora_down": (".lora_down.weight", ".lora_up.weight"),
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "lora_A default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "lora_A bare": (".lora_A", ".lora_B"),
    "lora.down": (".lora.down.weight", ".lora.up.weight"),
    "lora_linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "bare": (".down.weight", ".up.weight"),
}
_MAGNITUDES = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
#: Suffix of every other part → its role, which is the name of the update's field.
_PARTS: Mapping[str, str] = {
    ".alpha": "alpha",
    ".lora_mid.weight": "mid",
    ".lora_B.bias": "bias",
    ".lora_up.bias": "bias",
    **{f".hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": part for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".oft_blocks": "blocks",
    ".rescale": "rescale",
    **{f".{part}.weight": part for part in ("a1", "a2", "b1", "b2", "bm")},
    ".weight": "ia3",
    ".on_input": "on_input",
}
#: Suffix → (role, which of the module's parameters): a change of one parameter, or its new value.
PARAMETERS: Mapping[str, tuple[str, str]] = {
    ".diff": ("diff", "weight"),
    ".diff_b": ("diff", "bias"),
    ".w_norm": ("diff", "weight"),
    ".b_norm": ("diff", "bias"),
    ".set_weight": ("full", "weight"),
}
#: Kinds of update that these suffixes spell.
SPELT = frozenset({"lora", "dora", "tucker", "loha", "lokr", "diff", "ia3", "oft", "boft", "glora", "full"})
SUFFIXES: Mapping[str, Suffix] = {
    **{pair[0]: Suffix("down", style) for style, pair in PAIRS.items()},
    **{pair[1]: Suffix("up", style) for style, pair in PAIRS.items()},
    **{suffix: Suffix("magnitude", suffix) for suffix in _MAGNITUDES},
    **{suffix: Suffix(role, suffix) for suffix, role in _PARTS.items()},
    **{suffix: Suffix("parameter", suffix) for suffix in PARAMETERS},
}
_PATTERN = re.compile("(?:" + "|".join(map(re.escape, sorted(SUFFIXES, key=len, reverse=True))) + ")$")


def split_key(key: str) -> tuple[str, str] | None:
    """``(module's name, suffix)`` of a key, or None where it ends in no known suffix."""
    found = _PATTERN.search(key)
    return (key[: found.start()], found[0]) if found and found.start() else None


def parameter(suffix: str, key: str, ref: TensorRef) -> tuple[str, Update]:
    """``("weight" or "bias", update)`` of a suffix of `PARAMETERS`."""
    role, name = PARAMETERS[suffix]
    return name, Diff(ref, key) if role == "diff" else Full(ref, key)


def build(parts: Mapping[str, str], file: AdapterFile, alpha: float | None) -> Update | None:
    """The update whose tensors are those of one module.

    Args:
        parts: suffix → key, without those of `PARAMETERS`.
        file: that holds the keys.
        alpha: the value of its alpha tensor.

    Returns:
        The update, or None where the suffixes make up no kind that is known.

    Raises:
        InputError: a part of it is missing, doubled, of a wrong dtype or shape.
    """
    held = Parts()
    for suffix, key in parts.items():
        held.add(SUFFIXES[suffix].role, key, file.tensors[key], file.path)
    update = _kind(held, parts, file, alpha)
    if update is not None:
        _check(update, held, file)
    return update


def _check(update: Update, held: Parts, file: AdapterFile) -> None:
    """Raise an `InputError` for a part that is no float, or whose shape does not belong to the others'."""
    keys = {"weight": held.keys.get("ia3"), **held.keys}
    for role, ref in update.parts().items():
        if role not in ("alpha", "on_input"):
            check_float(ref, file.path, keys[role] or role)
    found = mismatch(update)
    if found is not None:
        role, what = found
        remedy = "The file is damaged or was edited: get another one."
        raise InputError(what, file=file.path, key=keys[role], remedy=remedy)


def _kind(held: Parts, parts: Mapping[str, str], file: AdapterFile, alpha: float | None) -> Update | None:
    roles = held.tensors
    if any(suffix.startswith(".hada_") for suffix in parts):
        return _loha(held, file, alpha)
    if any(suffix.startswith(".lokr_") for suffix in parts):
        return _lokr(held, file, alpha)
    if "blocks" in roles:
        return _rotation(held, file)
    if {"a1", "a2", "b1", "b2"} & set(roles):
        return _glora(held, file, alpha)
    if "on_input" in roles:
        _need(held, ("ia3", "on_input"), file)
        return Ia3(roles["ia3"], roles["on_input"]) if set(roles) == {"ia3", "on_input"} else None
    if "ia3" in roles or not {"up", "down"} & set(roles):
        return None
    return _lora(held, file, alpha)


def _lora(held: Parts, file: AdapterFile, alpha: float | None) -> LowRank | Tucker | None:
    roles = held.tensors
    if not set(roles) <= {"up", "down", "mid", "alpha", "magnitude", "bias"}:
        return None
    up, down = held.check_pair(file.path)
    # Trainers take a stored 0 for "as the rank".
    scale = (alpha or down.shape[0]) / down.shape[0]
    stored_alpha, magnitude = roles.get("alpha"), _magnitude(held, up.shape[0], file)
    if "mid" not in roles:
        return LowRank(up, down, scale, stored_alpha, magnitude, roles.get("bias"))
    mid = roles["mid"]
    if len(mid.shape) < 3 or mid.shape[0] != up.shape[1] or mid.shape[1] != down.shape[0] or "bias" in roles:
        raise _misfit(held, "mid", f"the core {list(mid.shape)} does not fit factors of rank {down.shape[0]}", file)
    return Tucker(up, mid, down, scale, stored_alpha, magnitude)


def _magnitude(held: Parts, outputs: int, file: AdapterFile) -> TensorRef | None:
    """DoRA's magnitude as updates hold it: per output row as (out,), per input column as it is."""
    ref = held.tensors.get("magnitude")
    if ref is None:
        return None
    check_float(ref, file.path, held.keys["magnitude"])
    if 1 not in ref.shape and len(ref.shape) != 1:
        raise _misfit(held, "magnitude", f"{list(ref.shape)} is no norm per row or per column", file)
    per_output = prod(ref.shape) == outputs and (len(ref.shape) == 1 or ref.shape[0] != 1 or prod(ref.shape) == 1)
    # PEFT's (1, out, 1, 1) on a convolution; LyCORIS' per-input norms have the same form.
    if held.keys["magnitude"].endswith("lora_magnitude_vector") or per_output:
        return flat(ref)
    return ref


def _loha(held: Parts, file: AdapterFile, alpha: float | None) -> LoHa | None:
    roles = held.tensors
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    if not set(roles) <= {*names, "t1", "t2", "alpha", "magnitude"}:
        return None
    _need(held, (*names, *(("t1", "t2") if {"t1", "t2"} & set(roles) else ())), file)
    rank = roles["w1_b"].shape[0] if roles["w1_b"].shape else 0
    for a, b in (("w1_a", "w1_b"), ("w2_a", "w2_b")):
        inner = roles[a].shape[:1] if "t1" in roles else roles[a].shape[1:2]
        _matrices(held, (a, b), file)
        if len(roles[a].shape) != 2 or len(roles[b].shape) != 2:
            raise _misfit(held, a, f"{list(roles[a].shape)} and {list(roles[b].shape)} are no matrices", file)
        if inner != roles[b].shape[:1]:
            raise _misfit(held, a, f"{list(roles[a].shape)} does not fit {list(roles[b].shape)}", file)
    if any(roles[name].shape != roles[other].shape for name, other in (("w1_a", "w2_a"), ("w1_b", "w2_b"))) and (
        roles["w1_a"].shape[0] != roles["w2_a"].shape[0] or roles["w1_b"].shape[1:] != roles["w2_b"].shape[1:]
    ):
        raise _misfit(held, "w2_a", "the two halves have different sizes", file)
    outputs = roles["w1_a"].shape[1 if "t1" in roles else 0]
    return LoHa(
        roles["w1_a"],
        roles["w1_b"],
        roles["w2_a"],
        roles["w2_b"],
        (alpha or rank) / rank,
        roles.get("t1"),
        roles.get("t2"),
        roles.get("alpha"),
        _magnitude(held, outputs, file),
    )


def _lokr(held: Parts, file: AdapterFile, alpha: float | None) -> LoKr | None:
    roles = held.tensors
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    if not set(roles) <= {*names, "alpha", "magnitude"}:
        return None
    for whole, a, b in (("w1", "w1_a", "w1_b"), ("w2", "w2_a", "w2_b")):
        if whole in roles and {a, b} & set(roles):
            raise _misfit(held, whole, "stands beside its own factors", file)
        _need(held, (whole,) if whole in roles else (a, b), file)
        _matrices(held, (whole,) if whole in roles else (a, b), file)
        if whole not in roles:
            if len(roles[a].shape) != 2 or len(roles[b].shape) != 2:
                raise _misfit(held, a, f"{list(roles[a].shape)} and {list(roles[b].shape)} are no matrices", file)
            tucker = whole == "w2" and "t2" in roles
            if roles[a].shape[0 if tucker else 1] != roles[b].shape[0]:
                raise _misfit(held, a, f"{list(roles[a].shape)} does not fit {list(roles[b].shape)}", file)
    low = roles.get("w1_b") or roles.get("w2_b")
    # With both halves full, LyCORIS takes scale 1 whatever alpha says.
    scale = 1.0 if low is None else (alpha or low.shape[0]) / low.shape[0]
    update = LoKr(
        scale,
        roles.get("w1"),
        roles.get("w1_a"),
        roles.get("w1_b"),
        roles.get("w2"),
        roles.get("w2_a"),
        roles.get("w2_b"),
        roles.get("t2"),
        roles.get("alpha"),
    )
    return replace(update, magnitude=_magnitude(held, update.shape[0], file))


def _rotation(held: Parts, file: AdapterFile) -> Oft | Boft | None:
    roles = held.tensors
    if not set(roles) <= {"blocks", "rescale", "alpha"}:
        return None
    blocks = roles["blocks"]
    check_float(blocks, file.path, held.keys["blocks"])
    if len(blocks.shape) not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
        raise _misfit(held, "blocks", f"{list(blocks.shape)} are no square blocks", file)
    kind = Oft if len(blocks.shape) == 3 else Boft
    return kind(blocks, roles.get("rescale"), roles.get("alpha"))


def _glora(held: Parts, file: AdapterFile, alpha: float | None) -> GLora | None:
    roles = held.tensors
    names = ("a1", "a2", "b1", "b2")
    if not set(roles) <= {*names, "bm", "alpha"}:
        return None
    _need(held, names, file)
    _matrices(held, names, file)
    rank = roles["a2"].shape[0]
    if not roles["a1"].shape[1] == rank == roles["b1"].shape[1] == roles["b2"].shape[0]:
        raise _misfit(held, "a2", "the factors' ranks differ", file)
    scale = (alpha or rank) / rank
    return GLora(roles["a1"], roles["a2"], roles["b1"], roles["b2"], scale, roles.get("bm"), roles.get("alpha"))


def _need(held: Parts, names: tuple[str, ...], file: AdapterFile) -> None:
    for name in names:
        if name not in held.tensors:
            raise InputError(
                f"has no matching {name} tensor: the update is incomplete",
                file=file.path,
                key=next(iter(held.keys.values())),
                remedy="Get the file again, or save it again from its trainer.",
            )


def _matrices(held: Parts, names: tuple[str, ...], file: AdapterFile) -> None:
    for name in names:
        check_float(held.tensors[name], file.path, held.keys[name])
        shape = held.tensors[name].shape
        if len(shape) < 2 or 0 in shape:
            raise _misfit(held, name, f"{list(shape)} is no matrix or kernel", file)


def _misfit(held: Parts, role: str, what: str, file: AdapterFile) -> InputError:
    remedy = "The file is damaged or was edited: get another one."
    return InputError(what, file=file.path, key=held.keys[role], remedy=remedy)


# Field of an update → suffix, where kinds don't share the field's name.
_FIELDS = {
    **{role: suffix for suffix, role in _PARTS.items() if not suffix.startswith((".hada_", ".lokr_"))},
    "weight": ".weight",
}
_OWN = {"loha": ".hada_", "lokr": ".lokr_"}


def spelled(update: Update, style: str = "lora_down", magnitude: str = ".dora_scale") -> dict[str, TensorRef]:
    """Suffix → tensor of an update that is kept by module, without its alpha.

    Args:
        update: of any kind but those kept by parameter.
        style: of `PAIRS`.
        magnitude: suffix of DoRA's magnitude.
    """
    suffixes: dict[str, TensorRef] = {}
    down, up = PAIRS[style]
    for role, ref in update.parts().items():
        if role == "alpha":
            continue
        bias = ".lora_up.bias" if style == "lora_down" else ".lora_B.bias"
        known = {"down": down, "up": up, "magnitude": magnitude, "bias": bias}
        own = f"{_OWN[update.kind]}{role}" if update.kind in _OWN else _FIELDS.get(role, "")
        suffixes[known.get(role) or own] = ref
    return suffixes
