"""PEFT's tuners beside LoRA whose change of a weight is known: their keys, configs and conventions.

Facts (peft 0.21.2; merged weights are judged in tests/formats/test_peft_kinds.py):

- LoHa, LoKr: ``hada_w1_a`` …, ``lokr_w1`` … without ``.weight``; scale = alpha / r, also where both halves of a LoKr
  are full. ``rank_pattern`` and ``alpha_pattern`` as for LoRA, with ``alpha`` in place of ``lora_alpha``.
- OFT: ``oft_R.weight``, the upper triangles of the blocks. BOFT: ``boft_R`` and ``boft_s``.
- IA3: ``ia3_l``, (out, 1), or (1, in) where ``feedforward_modules`` names the module; (1, n, 1, 1) on convolutions,
  where the config alone tells the axis.
- Trainable tokens: ``trainable_tokens_delta`` (tokens, width) holds new rows of an embedding, by the config's indices;
  beside a LoRA with a level ``token_adapter`` before it.
- LORAX, SVDIFF and FOURA (`regraft.tuners`): `regraft.formats._peft_tuners`. VERA and FOURIERFT:
  `regraft.formats._peft_random`.
- Without a config: scale 1, OFT by PEFT's defaults, IA3's axis by shape.
- Every other tuner (VB-LoRA, HRA, prompts, …) is named, and its keys are listed: nothing of it is guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from regraft.adapter import MODEL, TokenRef
from regraft.errors import InputError
from regraft.formats import AdapterFile
from regraft.formats._common import Parts, check_float
from regraft.formats._factors import cannot_hold
from regraft.formats._peft_config import Config, by_pattern, check_numbers, check_pattern, exactly, is_matched
from regraft.formats._peft_lokr import lokr_config
from regraft.formats._peft_random import PARTS as RANDOM_PARTS
from regraft.formats._peft_random import (
    RANDOM,
    build_random,
    check_random_config,
    corrected_random,
    random_parts,
    shared_projections,
)
from regraft.formats._peft_tuners import PARTS, TUNERS, build_tuner, check_tuner_config, tuner_parts
from regraft.formats._suffixes import build
from regraft.patterns import compiled, matches
from regraft.tensors import InMemory, TensorRef
from regraft.updates import Boft, Foura, FourierFT, Ia3, LoHa, LoKr, Oft, SpectralShift, Subspace, Update, Vera

#: peft_type → kind of update.
TYPES = {"LOHA": LoHa, "LOKR": LoKr, "OFT": Oft, "BOFT": Boft, "IA3": Ia3} | TUNERS | RANDOM
TOKENS = "TRAINABLE_TOKENS"
_BEGINNINGS = {"hada": "LOHA", "lokr": "LOKR", "oft": "OFT", "boft": "BOFT", "ia3": "IA3"}
_BEGINNINGS |= {name.lower(): name for name in (*TUNERS, *RANDOM)}
_KEY = re.compile(
    r"(?P<path>.+)\.(?P<part>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_R|boft_[Rs]|ia3_l|"
    rf"{PARTS}|{RANDOM_PARTS})"
    r"(?:\.(?!weight$)(?P<name>[^.]+))?(?P<suffix>\.weight)?"
)
_TOKENS_KEY = re.compile(r"(?P<path>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
# Fields that narrow down what target_modules names.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
# PEFT's own defaults, for a file without its config.
_NEUMANN_TERMS = 5


def split_kind(key: str) -> tuple[str, str, str, str] | None:
    """peft_type, module path, part and adapter name of a key without its prefix; None for other keys."""
    found = _KEY.fullmatch(key)
    if found is None or (found["part"] == "oft_R") != bool(found["suffix"]):
        return None
    return _BEGINNINGS[found["part"].partition("_")[0]], found["path"], found["part"], found["name"] or ""


def split_tokens(key: str) -> str | None:
    """Path of the embedding whose rows a key replaces; None for other keys."""
    found = _TOKENS_KEY.fullmatch(key)
    return found["path"] if found else None


def token_of(path: str, config: Config | None) -> TokenRef:
    """The name of an embedding's replaced rows, with their numbers where the config tells them."""
    numbers = (config or {}).get("token_indices")
    given = (config or {}).get("trainable_token_indices")
    if isinstance(given, Mapping):
        numbers = next((value for name, value in given.items() if is_matched(path, [str(name)])), None)
    elif given is not None:
        numbers = given
    return TokenRef(MODEL, f"{path}{numbers if isinstance(numbers, list) else '[…]'}")


def build_kind(
    kind: str, path: str, parts: Mapping[str, str], file: AdapterFile, projections: Mapping[str, str], modules: int
) -> Update:
    """The update of one module.

    Args:
        kind: peft_type.
        path: of the module.
        parts: part (``hada_w1_a``) → key.
        file: that holds the keys.
        projections: VeRA's ``A`` and ``B`` → key, as far as the file has them.
        modules: how many of the kind the file has.

    Raises:
        InputError: a part is missing, of a wrong dtype or shape.
    """
    config = file.config
    if kind in ("LOHA", "LOKR"):
        update = build({f".{part}": key for part, key in parts.items()}, file, None)
        assert isinstance(update, LoHa | LoKr)
        return replace(update, scale=1.0 if config is None else kind_scale(config, path, update.rank))
    if kind in TUNERS:
        return build_tuner(kind, path, parts, file)
    if kind in RANDOM:
        return build_random(kind, path, parts, projections, modules, file)
    held = Parts()
    for part, key in parts.items():
        held.add(part, key, file.tensors[key], file.path)
        check_float(file.tensors[key], file.path, key)
    if kind == "OFT":
        blocks = _shaped(held, "oft_R", 2, file.path)
        own = config or {}
        series = own.get("use_cayley_neumann", True)
        terms = int(own.get("num_cayley_neumann_terms", _NEUMANN_TERMS)) if series else None
        return Oft(blocks, convention="peft", terms=terms, eps=float(own["eps"]) if own.get("coft") else None)
    if kind == "BOFT":
        return Boft(_shaped(held, "boft_R", 4, file.path), _shaped(held, "boft_s", 2, file.path), convention="peft")
    factors = held.tensors["ia3_l"]
    on_input = _on_input(path, factors, config)
    if (config or {}).get("fan_in_fan_out"):
        # Our axis is that of the base's own weight, which is (in, out) there.
        on_input = not on_input
    return Ia3(factors, InMemory(torch.tensor(int(on_input))), convention="peft")


def _on_input(path: str, factors: TensorRef, config: Config | None) -> bool:
    if config is not None:
        named = config.get("feedforward_modules")
        if isinstance(named, str):
            return matches(compiled(named, around="({})$"), path)
        return isinstance(named, list) and is_matched(path, map(str, named))
    return len(factors.shape) == 2 and factors.shape[0] == 1


def _shaped(held: Parts, part: str, dims: int, file: Path) -> TensorRef:
    if part not in held.tensors:
        raise InputError(
            f"has no matching {part} tensor: the update is incomplete",
            file=file,
            key=next(iter(held.keys.values())),
            remedy="Get the file again, or save it again from its trainer.",
        )
    ref = held.tensors[part]
    if len(ref.shape) != dims or 0 in ref.shape:
        what = f"must have {dims} dimensions, but has shape {list(ref.shape)}"
        raise InputError(what, file=file, key=held.keys[part], remedy="The file is damaged: get another one.")
    return ref


def kind_scale(config: Config, path: str, rank: int | None) -> float:
    """alpha / r of LoHa and LoKr; r is the tensors' own, or the config's where both halves are full."""
    alpha = by_pattern(config.get("alpha_pattern"), path, config["alpha"])
    return alpha / (rank or by_pattern(config.get("rank_pattern"), path, config["r"]) or 1)


def check_kind_config(config: Config, kind: str, file: Path) -> None:
    """Make sure that what `build_kind` reads out of a config is there.

    Raises:
        InputError: a field is missing, or no number.
    """
    if kind in TUNERS:
        check_tuner_config(config, kind, file)
    if kind in RANDOM:
        check_random_config(config, kind, file)
    if kind in ("LOHA", "LOKR"):
        check_numbers(config, ("r", "alpha"), file)
        if config["r"] <= 0:
            what = f"must be a number above 0, not {config['r']!r}"
            raise InputError(what, file=file, key="r", remedy="Give the config that was saved with these weights.")
    named = config.get("feedforward_modules")
    if kind == "IA3" and isinstance(named, str):
        check_pattern(named, file, "feedforward_modules")


def kind_keys(update: Update, stem: str, name: str) -> dict[str, TensorRef]:
    """The keys of an update of one of `TYPES`.

    Args:
        update: of PEFT's convention.
        stem: prefix and module path.
        name: the adapter's, with its dot, as a raw state dict has it; or empty.
    """
    if isinstance(update, LoHa | LoKr):
        start = "hada" if isinstance(update, LoHa) else "lokr"
        left_out = ("alpha", "magnitude")
        parts = {f"{start}_{role}": ref for role, ref in update.parts().items() if role not in left_out}
        return {f"{stem}.{part}{name}": ref for part, ref in parts.items()}
    if isinstance(update, Subspace | SpectralShift | Foura):
        return {f"{stem}.{part}{name}": ref for part, ref in tuner_parts(update).items()}
    if isinstance(update, Vera | FourierFT):
        return {f"{stem}.{part}{name}": ref for part, ref in random_parts(update).items()}
    if isinstance(update, Oft):
        return {f"{stem}.oft_R{name}.weight": update.blocks}
    if isinstance(update, Boft):
        assert update.rescale is not None
        return {f"{stem}.boft_R{name}": update.blocks, f"{stem}.boft_s{name}": update.rescale}
    assert isinstance(update, Ia3)
    return {f"{stem}.ia3_l{name}": update.weight}


def projection_keys(updates: Mapping[str, Update], spelt: Mapping[str, str], name: str) -> dict[str, TensorRef]:
    """The keys of what the VeRA updates of a file share.

    Args:
        updates: module path → update, of any kind.
        spelt: ``A`` and ``B`` → key, where the file had them.
        name: the adapter's, as `kind_keys` takes it.
    """
    found = shared_projections(updates)
    return {spelt.get(part, f"base_model.vera_{part}{name}"): ref for part, ref in found.items()}


def check_kind(update: Update, path: str, *, own: bool) -> str:
    """The peft_type that holds an update.

    Raises:
        OutputError: PEFT has no place for it.
    """
    kind = next((name for name, known in TYPES.items() if isinstance(update, known)), None)
    if kind is None:
        raise cannot_hold("PEFT", f"{update.kind} updates", path)
    if update.magnitude is not None:
        raise cannot_hold("PEFT", f"DoRA's magnitude beside a {update.kind} update", path)
    if isinstance(update, Subspace | Foura) and not own:
        raise cannot_hold("PEFT", f"{update.kind} updates without the config that they were saved with", path)
    if isinstance(update, Oft | Boft | Ia3) and (update.convention != "peft" or not own):
        raise cannot_hold("PEFT", f"{update.kind} updates of another tool's convention", path)
    if isinstance(update, Oft | Boft) and update.strength != 1.0:
        raise cannot_hold("PEFT", f"{update.kind} updates at a strength other than 1", path)
    return kind


def corrected_kind(
    config: Config | None, kind: str, updates: Mapping[str, Update], *, keep_targets: bool
) -> dict[str, Any]:
    """The config, true for these updates, all of one peft_type.

    Args:
        config: the adapter's old config, or None.
        kind: peft_type.
        updates: module path → update.
        keep_targets: the modules are those that the config was saved with.
    """
    result: dict[str, Any] = dict(config) if config is not None else {"peft_type": kind, "inference_mode": True}
    if kind == "LOKR" and config is None:
        cut = lokr_config({path: update for path, update in updates.items() if isinstance(update, LoKr)})
        if cut is None:
            what = "LoKr updates that are cut into halves otherwise than PEFT does"
            raise cannot_hold("PEFT", what, next(iter(updates)))
        result |= cut[0]
        _set_scales(result, updates, cut[1])
    elif kind in ("LOHA", "LOKR"):
        _scales(result, config, updates)
    if kind in RANDOM:
        result = corrected_random(result, kind, updates)
    if kind == "SVDIFF" and config is None:
        # One number on a norm is a shift of its norm; a matrix of one singular value is told by its module.
        result["norm_shift"] = "scalar" if any(update.rank == 1 for update in updates.values()) else "element"
    if kind == "LOHA" and config is None:
        result["use_effective_conv2d"] = any(isinstance(u, LoHa) and u.t1 is not None for u in updates.values())
    if not keep_targets:
        result["target_modules"] = sorted(updates)
        for field in _NARROWING:
            if result.get(field) is not None:
                result[field] = None
        if kind == "IA3" and not isinstance(result.get("feedforward_modules"), str):
            turned = bool(result.get("fan_in_fan_out"))
            inner = {path for path, update in updates.items() if isinstance(update, Ia3) and update.per_input != turned}
            result["feedforward_modules"] = sorted(inner)
    return result


def _scales(result: dict[str, Any], config: Config | None, updates: Mapping[str, Update]) -> None:
    """Set rank and alpha per module where the old config doesn't give them."""
    known = {path: update for path, update in updates.items() if isinstance(update, LoHa | LoKr)}
    if config is not None and all(
        abs(kind_scale(config, path, update.rank) - update.scale) <= 1e-6 * abs(update.scale)
        and (update.rank is None or by_pattern(config.get("rank_pattern"), path, config["r"]) == update.rank)
        for path, update in known.items()
    ):
        return
    old_rank = int((config or {}).get("r", 1))
    _set_scales(result, known, {path: update.rank or old_rank for path, update in known.items()})


def _set_scales(result: dict[str, Any], updates: Mapping[str, Update], ranks: Mapping[str, int]) -> None:
    known = {path: update for path, update in updates.items() if isinstance(update, LoHa | LoKr)}
    alphas = {path: update.scale * ranks[path] for path, update in known.items()}
    for values, field, pattern in ((ranks, "r", "rank_pattern"), (alphas, "alpha", "alpha_pattern")):
        usual = Counter(values.values()).most_common(1)[0][0]
        result[field] = usual
        result[pattern] = {exactly(path): value for path, value in values.items() if value != usual}
