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
- Parameters stored whole: ``modules_to_save``, trained biases (``<module>.bias``, with a segment ``base_layer`` where
  the module has a LoRA too), and a copy of a targeted embedding's weight (``<module>.base_layer.weight``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.errors import OutputError
from regraft.families import family_of_modules, refine_by_hint
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._common import Choices, Parts, chosen, contiguous, shapes_of, training_metadata
from regraft.formats._factors import Reshaped, cannot_hold, flat, folded, magnitude_per_output, transposed
from regraft.formats._model_card import CARD, with_base
from regraft.formats._peft_config import MINIMAL, check_config, corrected, scale_of
from regraft.output import ADAPTER_CONFIG
from regraft.tensors import TensorRef, Transposed
from regraft.updates import Full, LowRank, Update
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
    r"fourierft_|prompt_|adaption_|randlora_|shira_|c3a_|miss_|bone_|road_|waveft_|osf_|gralora_|delora_)"
)
# The weights of these heads are (out, in) even in a model whose blocks are Conv1D.
_LINEAR_HEADS = ("lm_head", "score", "classifier", "qa_outputs", "summary")


def _detect(file: AdapterFile) -> bool:
    if any(key.startswith(PREFIX) for key in file.tensors):
        return True
    return file.config is not None and ("peft_type" in file.config or "lora_alpha" in file.config)


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    config = file.config
    prefix = PREFIX if any(key.startswith(PREFIX) for key in file.tensors) else ""
    kind = str((config or {}).get("peft_type") or "LORA").upper()
    if config is not None and kind == "LORA":
        where = file.path / CONFIG if file.path.is_dir() else file.path.with_name(CONFIG)
        check_config(config, where)
    wrapped = _wrapped_parameters(config)
    parts: dict[str, Parts] = {}
    full: dict[str, Full] = {}
    unrecognised: list[str] = []
    adapter_names: set[str] = set()
    magnitudes = Choices()
    for key, ref in file.tensors.items():
        found = _LORA.fullmatch(key.removeprefix(prefix))
        role = _ROLES.get((found["part"], found["suffix"])) if found else None
        if kind != "LORA" or not key.startswith(prefix) or (found and found["path"].endswith(wrapped)):
            unrecognised.append(key)
        elif found and role:
            parts.setdefault(found["path"], Parts()).add(role, key, ref, file.path)
            if found["name"]:
                adapter_names.add(found["name"])
            if role == "magnitude":
                magnitudes.note(MODEL, found["path"], found["suffix"] or "")
            if "embedding" in found["part"]:
                parts[found["path"]].embedding = True
        elif _OTHER_TUNERS.search(f".{key}"):
            unrecognised.append(key)
        else:
            full[_whole_parameter(key.removeprefix(prefix))] = Full(ref, key)
    updates: dict[ModuleRef, Update] = {
        ModuleRef(MODEL, path): _low_rank(path, part, file) for path, part in parts.items()
    }
    updates |= {ModuleRef(MODEL, path): update for path, update in full.items()}
    layout = {
        "bare": config is None,
        "prefix": prefix,
        "adapter_name": next(iter(adapter_names)) if len(adapter_names) == 1 else "",
        "magnitude": magnitudes.to_layout(),
        "modules": tuple(parts),
        "base_model": (config or {}).get("base_model_name_or_path"),
    }
    family = refine_by_hint(family_of_modules(shapes_of(updates)), _hint(config))
    return Adapter(
        updates,
        "peft",
        layout,
        file.metadata,
        config,
        family,
        unrecognised=tuple(unrecognised),
        sidecars=file.sidecars,
        path=file.path,
    )


def _wrapped_parameters(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    # `target_parameters` stacks one LoRA per expert in a single pair: it is no plain product.
    names = (config or {}).get("target_parameters") or ()
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
    flat_head = path.rpartition(".")[2] in _LINEAR_HEADS
    conv1d = bool((file.config or {}).get("fan_in_fan_out")) and len(up.shape) == 2 and not flat_head
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
    if adapter.tokens:
        token = next(iter(adapter.tokens))
        raise cannot_hold("PEFT", "embeddings of added tokens", token, "They would be lost: keep the old format.")
    paths = next(iter(components.values()), {})
    own = adapter.format == "peft"
    bare = own and bool(adapter.layout.get("bare"))
    low_rank = {path: update for path, update in paths.items() if isinstance(update, LowRank)}
    _check_uniform(low_rank)
    tensors: dict[str, TensorRef] = {}
    for path, update in paths.items():
        if isinstance(update, Full):
            tensors[_full_key(adapter, path, update)] = update.value
        elif isinstance(update, LowRank):
            tensors |= _keys(adapter, path, folded(update) if bare else update)
        else:
            raise cannot_hold("PEFT", f"{update.kind} updates", path, "It would be lost: keep the old format.")
    metadata = dict(adapter.metadata) if own else {"format": "pt", **training_metadata(adapter.metadata)}
    if bare:
        _check_bare(low_rank)
        return Written(contiguous(tensors), metadata)
    config = adapter.config if own and adapter.config is not None else MINIMAL
    keep = own and adapter.config is not None and set(adapter.layout.get("modules", ())) == set(low_rank)
    config = corrected(config, low_rank, keep_targets=keep)
    if any(update.orientation == "conv1d" for update in low_rank.values()):
        config["fan_in_fan_out"] = True
    files: dict[str, str | Path] = {CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n", **adapter.sidecars}
    if CARD in files and own:
        old, new = adapter.layout.get("base_model"), config.get("base_model_name_or_path")
        files[CARD] = with_base(adapter.sidecars[CARD], old, new)
    return Written(contiguous(tensors), metadata, files, folder=True)


def _check_bare(updates: Mapping[str, LowRank]) -> None:
    for path, update in updates.items():
        if update.orientation == "conv1d":
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


def _keys(adapter: Adapter, path: str, update: LowRank) -> dict[str, TensorRef]:
    layout = adapter.layout if adapter.format == "peft" else {}
    name = f".{layout['adapter_name']}" if layout.get("adapter_name") else ""
    stem = f"{layout.get('prefix', PREFIX)}{path}"
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
