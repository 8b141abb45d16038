"""PEFT: ``adapter_model.safetensors`` beside ``adapter_config.json``, or such a weights file alone.

Facts (peft 0.21):

- Key: ``base_model.model.`` + module path + ``.lora_A.weight`` (r, in) and ``.lora_B.weight`` (out, r). A raw state
  dict has the adapter's name in it: ``.lora_A.default.weight``.
- No alpha tensor. Scale = lora_alpha / r, or lora_alpha / √r with ``use_rslora``; ``rank_pattern`` and
  ``alpha_pattern`` override both per module. A file without its config has no alpha at all: we take alpha = r, scale 1.
- Convolution: A (r, in, kh, kw), B (out, r, 1, 1).
- Embedding: ``lora_embedding_A`` (r, vocab), ``lora_embedding_B`` (hidden, r), without ``.weight``; ΔW is (B A)ᵀ.
- ``fan_in_fan_out`` (GPT-2's Conv1D): the base's weight is (in, out), so ΔW is (B A)ᵀ there too.
- DoRA: ``lora_magnitude_vector`` without ``.weight``; (out,), or (1, out, 1, 1) for a convolution. ``lora_B.bias`` is
  scaled like ΔW.
- QA-LoRA (``use_qalora``, for GPTQ bases): A reads means over groups of inputs, times the number of groups, so that
  A stands for itself with each column repeated, times groups / group size. Written as a plain LoRA.
- Other tuners (LoHa, LoKr, OFT, BOFT, IA3, VeRA, FourierFT, trainable tokens, and those of `regraft.tuners`):
  `regraft.formats._peft_kinds`. One file holds one kind.
- ``target_parameters`` (experts stacked in one parameter) are no plain products: their keys are listed, not read.
- Parameters stored whole: ``modules_to_save``, trained biases (``<module>.bias``, with a segment ``base_layer`` where
  the module has a LoRA too), and a copy of a targeted embedding's weight (``<module>.base_layer.weight``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.adapter import MODEL, Adapter, ModuleRef, TokenRef
from regraft.errors import OutputError
from regraft.families import family_of_modules, refine_by_hint
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._bundled_embeddings import check_embedding
from regraft.formats._common import Choices, Parts, chosen, contiguous, doubled, shapes_of, training_metadata
from regraft.formats._factors import Repeated, Reshaped, cannot_hold, flat, folded, magnitude_per_output, transposed
from regraft.formats._model_card import CARD, with_base
from regraft.formats._peft_config import as_lora, check_config, corrected, orientation_of, pooled_of, scale_of
from regraft.formats._peft_kinds import (
    TOKENS,
    TYPES,
    build_kind,
    check_kind,
    check_kind_config,
    corrected_kind,
    kind_keys,
    projection_keys,
    split_kind,
    split_tokens,
    token_of,
)
from regraft.formats._peft_random import split_projection
from regraft.output import ADAPTER_CONFIG
from regraft.tensors import TensorRef, Transposed
from regraft.updates import FourierFT, Full, LoHa, LoKr, LowRank, Update, Vera
from regraft.updates.lowrank import Orientation

PREFIX = "base_model.model."
CONFIG = ADAPTER_CONFIG

_LORA = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)(?P<name>[^.]+))?(?P<suffix>\.weight|\.bias)?"
)
_ROLES = {
    ("lora_A", ".weight"): "down",
    ("lora_B", ".weight"): "up",
    ("lora_B", ".bias"): "bias",
    ("lora_embedding_A", None): "down",
    ("lora_embedding_B", None): "up",
    ("lora_magnitude_vector", None): "magnitude",
    ("lora_magnitude_vector", ".weight"): "magnitude",
}
# Parts of PEFT's other tuners: never a parameter stored whole.
_OTHER_TUNERS = re.compile(
    r"\.(lora_|hada_|lokr_|oft_|boft_|ia3_|vera_|trainable_tokens|token_adapter|glora_|ln_tuning|hra_|vblora_|"
    r"fourierft_|prompt_|adaption_|randlora_|shira_|c3a_|miss_|bone_|road_|waveft_|osf_|gralora_|delora_|lorax_|svdiff_|foura_)"
)
_READ = ("LORA", *TYPES, TOKENS)


def _detect(file: AdapterFile) -> bool:
    if any(key.startswith(PREFIX) for key in file.tensors):
        return True
    return file.config is not None and ("peft_type" in file.config or "lora_alpha" in file.config)


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    config = file.config
    prefix = PREFIX if any(key.startswith(PREFIX) for key in file.tensors) else ""
    stated = None if config is None else str(config.get("peft_type") or "LORA").upper()
    where = file.path / CONFIG if file.path.is_dir() else file.path.with_name(CONFIG)
    if config is not None and stated == "LORA":
        check_config(config, where)
    keys = _sorted_keys(file, prefix, stated)
    if config is not None and keys.kinds:
        check_kind_config(config, str(stated), where)
    updates: dict[ModuleRef, Update] = {
        ModuleRef(MODEL, path): _low_rank(path, part, file) for path, part in keys.lora.items()
    }
    for (kind, path), parts in keys.kinds.items():
        ref = ModuleRef(MODEL, path)
        if ref in updates:
            raise doubled(f"update of {ref}", file.path, next(iter(parts.values())))
        modules = sum(other == kind for other, _ in keys.kinds)
        updates[ref] = build_kind(kind, path, parts, file, keys.projections, modules)
    for path, update in keys.full.items():
        ref = ModuleRef(MODEL, path)
        if ref in updates:
            raise doubled(f"update of {ref}", file.path, update.key)
        updates[ref] = update
    layout = {
        "bare": config is None,
        "prefix": prefix,
        "adapter_name": next(iter(keys.names)) if len(keys.names) == 1 else "",
        "magnitude": keys.magnitudes.to_layout(),
        "modules": (*keys.lora, *(path for _, path in keys.kinds)),
        "base_model": (config or {}).get("base_model_name_or_path"),
        "nested": keys.nested,
        "projections": keys.projections,
        "tokens": {token: key for token, (key, _) in keys.tokens.items()},
        "unsupported": stated if stated is not None and stated not in _READ else "",
    }
    family = refine_by_hint(family_of_modules(shapes_of(updates)), _hint(config))
    return Adapter(
        updates,
        "peft",
        layout,
        file.metadata,
        config,
        family,
        tokens={token: ref for token, (_, ref) in keys.tokens.items()},
        unrecognised=tuple(keys.unrecognised),
        sidecars=file.sidecars,
        path=file.path,
    )


@dataclass
class _Keys:
    """The keys of a file by what they are."""

    lora: dict[str, Parts] = field(default_factory=dict)
    kinds: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    full: dict[str, Full] = field(default_factory=dict)
    tokens: dict[TokenRef, tuple[str, TensorRef]] = field(default_factory=dict)
    unrecognised: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    nested: dict[str, str] = field(default_factory=dict)
    magnitudes: Choices = field(default_factory=Choices)
    projections: dict[str, str] = field(default_factory=dict)


def _sorted_keys(file: AdapterFile, prefix: str, stated: str | None) -> _Keys:
    """Tell LoRA's keys, those of the other kinds and whole parameters apart; ``stated`` is the config's peft_type."""
    wrapped = _wrapped_parameters(file.config)
    keys = _Keys()
    for key, ref in file.tensors.items():
        name = key.removeprefix(prefix)
        found = _LORA.fullmatch(name)
        role = _ROLES.get((found["part"], found["suffix"])) if found else None
        kind = split_kind(name)
        embedding = split_tokens(name)
        projection = split_projection(key) if stated in (None, "VERA") else None
        if projection:
            side, own = projection
            if side in keys.projections:
                raise doubled(f"vera_{side}, beside {keys.projections[side]}", file.path, key)
            keys.projections[side] = key
            keys.names |= {own} if own else set()
        elif not key.startswith(prefix) or stated not in (None, *_READ) or (found and found["path"].endswith(wrapped)):
            keys.unrecognised.append(key)
        elif found and role and stated in (None, "LORA"):
            # Beside `target_parameters` the modules inside of the wrapped one have a level more.
            path = found["path"].replace(".base_layer.", ".")
            if path != found["path"]:
                keys.nested[path] = found["path"]
            part = keys.lora.setdefault(path, Parts())
            part.add(role, key, ref, file.path)
            part.embedding |= "embedding" in found["part"]
            if found["name"]:
                keys.names.add(found["name"])
            if role == "magnitude":
                keys.magnitudes.note(MODEL, path, found["suffix"] or "")
        elif kind and stated in (None, kind[0]):
            keys.kinds.setdefault((kind[0], kind[1]), {})[kind[2]] = key
            if kind[3]:
                keys.names.add(kind[3])
        elif embedding and stated in (None, "LORA", TOKENS):
            check_embedding(ref, file.path, key)
            keys.tokens[token_of(embedding, file.config)] = (key, ref)
        elif _OTHER_TUNERS.search(f".{key}"):
            keys.unrecognised.append(key)
        else:
            path = _whole_parameter(name)
            if path in keys.full:
                raise doubled(f"value of {path}, beside {keys.full[path].key}", file.path, key)
            keys.full[path] = Full(ref, key)
    if not any(kind == "VERA" for kind, _ in keys.kinds):
        keys.unrecognised += keys.projections.values()
    return keys


def _wrapped_parameters(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    # `target_parameters` stacks one LoRA per expert in a single pair: it is no plain product.
    names = (config or {}).get("target_parameters")
    # What else it may be is told by `check_config`.
    names = names if isinstance(names, list) else ()
    return tuple(str(name).rpartition(".")[0] or str(name) for name in names)


def _hint(config: Mapping[str, Any] | None) -> str:
    config = config or {}
    mapping = config.get("auto_mapping")
    kind = mapping.get("base_model_class", "") if isinstance(mapping, Mapping) else ""
    return f"{kind} {config.get('base_model_name_or_path') or ''}"


def _low_rank(path: str, part: Parts, file: AdapterFile) -> LowRank:
    up, down = part.check_pair(file.path)
    rank = down.shape[0]
    scale = scale_of(file.config, path, rank) if file.config is not None else 1.0
    magnitude, bias = part.tensors.get("magnitude"), part.tensors.get("bias")
    pooled = pooled_of(file.config)
    if pooled is not None and len(down.shape) == 2 and not part.embedding:
        scale *= down.shape[1] / pooled
        down = Repeated(down, pooled)
    conv1d = orientation_of(path, file.config) == "conv1d" and len(up.shape) == 2
    if not part.embedding and not conv1d:
        if magnitude is not None:
            # (1, out, 1, 1) on a convolution: as (out,) it can't be taken for a norm per input.
            magnitude = flat(magnitude)
        return LowRank(up, down, scale, magnitude=magnitude, bias=bias)
    if magnitude is not None:
        magnitude = Reshaped(magnitude, (1, up.shape[0]))
    orientation: Orientation = "embedding" if part.embedding else "conv1d"
    return LowRank(Transposed(down), Transposed(up), scale, magnitude=magnitude, bias=bias, orientation=orientation)


def _whole_parameter(key: str) -> str:
    """The parameter's name in the base, without PEFT's wrappers."""
    path = re.sub(r"\.modules_to_save\.[^.]+\.", ".", key)
    return path.replace(".base_layer.", ".")


def _write(adapter: Adapter) -> Written:
    components = adapter.components()
    if len(components) > 1:
        raise OutputError(
            f"PEFT files hold one model, but this adapter changes {len(components)}: {', '.join(components)}",
            file=adapter.path,
            remedy="Write it as diffusers or kohya.",
        )
    own = adapter.format == "peft"
    token_keys: Mapping[TokenRef, str] = adapter.layout.get("tokens", {}) if own else {}
    for token in adapter.tokens:
        if token not in token_keys:
            raise cannot_hold("PEFT", "embeddings of added tokens", token)
    paths = next(iter(components.values()), {})
    bare = own and bool(adapter.layout.get("bare"))
    low_rank = {path: update for path, update in paths.items() if isinstance(update, LowRank)}
    others = {path: update for path, update in paths.items() if not isinstance(update, LowRank | Full)}
    kind = _one_kind(low_rank, others, own=own)
    _check_uniform(low_rank)
    tensors: dict[str, TensorRef] = {token_keys[token]: ref for token, ref in adapter.tokens.items()}
    for path, update in paths.items():
        if isinstance(update, Full):
            tensors[_full_key(adapter, path, update)] = update.value
        elif isinstance(update, LowRank):
            tensors |= _keys(adapter, path, folded(update) if bare else update)
        else:
            tensors |= kind_keys(update, *_stem(adapter, path))
    tensors |= projection_keys(others, adapter.layout.get("projections", {}) if own else {}, _name(adapter))
    metadata = dict(adapter.metadata) if own else {"format": "pt", **training_metadata(adapter.metadata)}
    if bare:
        _check_bare(paths)
        return Written(contiguous(tensors), metadata)
    config = _config(adapter, kind, low_rank, others, own=own)
    files: dict[str, str | Path] = {
        CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n",
        **adapter.sidecars,
    }
    if CARD in files and own:
        old, new = adapter.layout.get("base_model"), config.get("base_model_name_or_path")
        files[CARD] = with_base(adapter.sidecars[CARD], old, new)
    return Written(contiguous(tensors), metadata, files, folder=True)


def _one_kind(low_rank: Mapping[str, LowRank], others: Mapping[str, Update], *, own: bool) -> str:
    """The peft_type of a file that holds these updates: there is one for all."""
    kinds = {check_kind(update, path, own=own): path for path, update in others.items()}
    if low_rank:
        kinds["LORA"] = next(iter(low_rank))
    if len(kinds) > 1:
        names = " beside ".join(sorted(kinds))
        raise cannot_hold("PEFT", f"{names}: one file has one peft_type", list(kinds.values())[1])
    return next(iter(kinds), "LORA")


def _config(
    adapter: Adapter, kind: str, low_rank: Mapping[str, LowRank], others: Mapping[str, Update], *, own: bool
) -> dict[str, Any]:
    keep = own and adapter.config is not None
    keep = keep and set(adapter.layout.get("modules", ())) == {*low_rank, *others}
    old = adapter.config if own and adapter.config is not None else None
    if kind != "LORA":
        return corrected_kind(old, kind, others, keep_targets=keep)
    # What holds trained tokens alone stays of its kind.
    config = corrected(as_lora(old) if low_rank or old is None else old, low_rank, keep_targets=keep)
    if any(update.orientation == "conv1d" for update in low_rank.values()):
        config["fan_in_fan_out"] = True
    # An activated LoRA does nothing until these tokens have come.
    invoked = (adapter.layout.get("fields") or {}).get("adapter.alora.invocation_tokens")
    return config | {"alora_invocation_tokens": invoked} if invoked else config


def _check_bare(updates: Mapping[str, Update]) -> None:
    for path, update in updates.items():
        if isinstance(update, LoHa | LoKr) and update.scale != 1.0:
            remedy = "Without its config nothing says the scale: write a folder."
            raise cannot_hold("bare PEFT", f"a {update.kind} update of another scale than 1", path, remedy)
        if isinstance(update, FourierFT):
            remedy = "Without its config nothing says its scale and places: write a folder."
            raise cannot_hold("bare PEFT", "a fourierft update", path, remedy)
        if isinstance(update, Vera) and update.seed is not None:
            remedy = "Without its config nothing says what its projections are drawn from: write a folder."
            raise cannot_hold("bare PEFT", "a vera update without its projections", path, remedy)
        if isinstance(update, LowRank | Vera) and update.orientation == "conv1d":
            remedy = "Without its config nothing says that the weights are transposed: write a folder."
            raise cannot_hold("bare PEFT", "an update of a Conv1D layer", path, remedy)


def _check_uniform(updates: Mapping[str, LowRank]) -> None:
    plain = [path for path, update in updates.items() if update.magnitude is None]
    if plain and len(plain) < len(updates):
        remedy = "PEFT's use_dora holds for the whole file: keep the old format."
        raise cannot_hold("PEFT", "modules with DoRA beside modules without it", plain[0], remedy)


def _full_key(adapter: Adapter, path: str, update: Full) -> str:
    prefix = adapter.layout.get("prefix", PREFIX) if adapter.format == "peft" else PREFIX
    if _whole_parameter(update.key.removeprefix(prefix)) == path:
        return update.key
    if ".base_layer." in update.key:
        module, _, name = path.rpartition(".")
        return f"{prefix}{module}.base_layer.{name}"
    return f"{prefix}{path}"


def _stem(adapter: Adapter, path: str) -> tuple[str, str]:
    """What stands before and, as a raw state dict's adapter name, behind a part's name."""
    layout = adapter.layout if adapter.format == "peft" else {}
    return f"{layout.get('prefix', PREFIX)}{layout.get('nested', {}).get(path, path)}", _name(adapter)


def _name(adapter: Adapter) -> str:
    name = adapter.layout.get("adapter_name") if adapter.format == "peft" else ""
    return f".{name}" if name else ""


def _keys(adapter: Adapter, path: str, update: LowRank) -> dict[str, TensorRef]:
    layout = adapter.layout if adapter.format == "peft" else {}
    stem, name = _stem(adapter, path)
    up, down = update.up, update.down
    if update.orientation == "embedding":
        keys = {f"{stem}.lora_embedding_A{name}": transposed(up), f"{stem}.lora_embedding_B{name}": transposed(down)}
    else:
        if update.orientation == "conv1d":
            up, down = transposed(down), transposed(up)
        keys = {f"{stem}.lora_A{name}.weight": down, f"{stem}.lora_B{name}.weight": up}
    if update.bias is not None:
        keys[f"{stem}.lora_B{name}.bias"] = update.bias
    if update.magnitude is not None:
        suffix = chosen(layout.get("magnitude", {}), MODEL, path, "")
        keys[f"{stem}.lora_magnitude_vector{name}{suffix}"] = magnitude_per_output(update, "PEFT", path)
    return keys


FORMAT = Format("peft", "PEFT folder, or its weights file alone", 100, _detect, _read, _write)
