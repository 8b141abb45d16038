"""diffusers: ``pytorch_lora_weights.safetensors``, all components of a pipeline in one file.

Facts (diffusers 0.42):

- Key: component (``unet.``, ``transformer.``, ``text_encoder.``, ``text_encoder_2.``, …) + module path + one of
  ``.lora_A/lora_B.weight`` (PEFT's, today), ``.lora.down/up.weight`` (U-Net of the SD and SDXL training scripts),
  ``.lora_linear_layer.down/up.weight`` (their text encoders). One file may mix them: names that the scripts' table
  lacks keep ``.lora_A``. So each key is read by itself.
- Up to 0.20 attention had ``….attn1.processor.to_q_lora.down.weight``, with ``to_out`` for ``to_out.0``; the earliest
  files lack the component. Text encoders: ``….self_attn.to_q_lora.down.weight`` for ``q_proj``.
- Scale: ``lora_adapter_metadata`` in the header is a JSON string of ``<component>.<LoraConfig field>`` entries; PEFT's
  rules hold. Without it alpha = rank, scale 1. Other tools put ``.alpha`` beside the pair.
- One model's ``save_lora_adapter`` leaves the component out of the keys and of those entries (``r``, ``lora_alpha``).
- DoRA: ``lora_magnitude_vector``, from OneTrainer with ``.weight``, and its norms per input as ``dora_scale``.
- Flux' control LoRAs have a ``lora_B.bias`` for each pair, and the norms of query and key stored whole
  (``….attn.norm_q.weight``), which the Flux pipelines set. OneTrainer bundles embeddings of tokens
  (`regraft.formats._bundled_embeddings`). A raw state dict has the adapter's name in it: ``.lora_A.default.weight``.
- transformers 5 leaves ``text_model.`` out of CLIPTextModel's names: both spellings occur.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from regraft.adapter import Adapter, ModuleRef
from regraft.errors import InputError
from regraft.families import family_of_modules, without_text_model
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._bundled_embeddings import TokenKeys, bundled, read_bundled
from regraft.formats._common import (
    Choices,
    Parts,
    alphas_of,
    chosen,
    component_for,
    contiguous,
    scalars,
    shapes_of,
    training_metadata,
)
from regraft.formats._factors import cannot_hold, flat, magnitude_per_output
from regraft.formats._hashes import with_true_hashes
from regraft.formats._peft_config import MINIMAL, check_config, corrected, scale_of
from regraft.tensors import InMemory, TensorRef
from regraft.updates import Full, LowRank, Update

METADATA = "lora_adapter_metadata"
COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "controlnet",
    "prior",
)

# Generation → what follows the module path for (down, up).
_PAIRS = {
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "lora_A default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "lora": (".lora.down.weight", ".lora.up.weight"),
    "lora_linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale")
_SUFFIXES: dict[str, tuple[str, str]] = {
    **{pair[0]: ("down", generation) for generation, pair in _PAIRS.items()},
    **{pair[1]: ("up", generation) for generation, pair in _PAIRS.items()},
    **{suffix: ("magnitude", suffix) for suffix in _MAGNITUDES},
    ".lora_B.bias": ("bias", ""),
    ".alpha": ("alpha", ""),
}
_SUFFIX = re.compile("|".join(re.escape(suffix) + "$" for suffix in sorted(_SUFFIXES, key=len, reverse=True)))
# Attention processors: the module's name is inside of the tensor's.
_PROCESSOR = re.compile(
    r"(?P<head>.+?\.)(?P<processor>processor\.)?to_(?P<part>q|k|v|out)_lora\.(?P<role>down|up)\.weight"
)
_UNET_PARTS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_TEXT_PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
# A file without components is a U-Net's or a transformer's, as its first names say.
_BARE_UNET = re.compile(r"(down_blocks|up_blocks|mid_block)\.")
_BARE_TRANSFORMER = re.compile(r"((single_)?transformer_blocks\.\d+|blocks\.\d+\.attn[12]\.(to|add)_)")
# Norms that the Flux pipelines set from a control LoRA's file; of other parameters none is loaded.
_WHOLE = re.compile(r"(?P<path>.+\.norm_(added_)?[qk])\.weight")


def _split(key: str, *, one_model: bool = False) -> tuple[str, str, str, str] | None:
    """Component ("" where there is none), module path, role and spelling of a key; None if it is no part of a pair."""
    component, dot, rest = key.partition(".")
    if not dot or component not in COMPONENTS:
        component, rest = "", key
        if not one_model and not _BARE_UNET.match(key):
            return None
    if old := _PROCESSOR.fullmatch(rest):
        parts = _UNET_PARTS if old["processor"] else _TEXT_PARTS
        spelling = "processor" if old["processor"] else "attention"
        return component, old["head"] + parts[old["part"]], old["role"], spelling
    if found := _SUFFIX.search(rest):
        role, spelling = _SUFFIXES[found[0]]
        return component, rest[: found.start()], role, spelling
    return None


def _is_bare_transformer(file: AdapterFile) -> bool:
    """Whether the keys are those of a transformer alone, without its component in front."""
    return any(map(_BARE_TRANSFORMER.match, file.tensors)) and any(map(_SUFFIX.search, file.tensors))


def _detect(file: AdapterFile) -> bool:
    if METADATA in file.metadata or _is_bare_transformer(file):
        return True
    return any(part is not None and part[2] in ("down", "up") for part in map(_split, file.tensors))


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    configs = _configs(file.metadata, file.path)
    main, one_model = _main_component(file.tensors), "" in configs
    if one_model:
        configs[main] = configs.pop("") | configs.get(main, {})
    named = one_model or _is_bare_transformer(file)
    tokens, token_keys = read_bundled(file.tensors, file.path)
    whole: dict[ModuleRef, Update] = {}
    parts: dict[ModuleRef, Parts] = {}
    generations, magnitudes = Choices(), Choices()
    unrecognised: list[str] = []
    bare = False
    for key, ref in file.tensors.items():
        if key in token_keys.values():
            continue
        split = _split(key, one_model=named)
        if split is None and (parameter := _parameter(key, main if named else "")):
            whole[parameter] = Full(ref, key)
            bare |= not key.startswith(f"{parameter.component}.")
            continue
        if split is None:
            unrecognised.append(key)
            continue
        component, path, role, spelling = split
        bare |= not component
        module = ModuleRef(component or main, path)
        parts.setdefault(module, Parts()).add(role, key, ref, file.path)
        if role == "down":
            generations.note(*module, spelling)
        elif role == "magnitude":
            magnitudes.note(*module, spelling)
    alphas = {module: part.tensors["alpha"] for module, part in parts.items() if "alpha" in part.tensors}
    values = scalars(alphas, file.path)
    updates: dict[ModuleRef, Update] = {
        module: _low_rank(module, part, values.get(module), configs.get(module.component), file.path)
        for module, part in parts.items()
    }
    updates |= whole
    layout = {
        "generations": generations.to_layout(),
        "magnitudes": magnitudes.to_layout(),
        "bare": bare,
        "tokens": token_keys,
        "unprefixed": main if one_model else "",
        "modules": {component: tuple(paths) for component, paths in _grouped(parts).items()},
    }
    return Adapter(
        updates,
        "diffusers",
        layout,
        file.metadata,
        family=family_of_modules(shapes_of(updates)),
        tokens=tokens,
        unrecognised=tuple(unrecognised),
        path=file.path,
    )


def _parameter(key: str, unprefixed: str) -> ModuleRef | None:
    """The transformer's norm that a key stores whole; None for other keys."""
    component, _, rest = key.partition(".")
    if component != "transformer":
        component, rest = unprefixed, key
    return ModuleRef(component, rest) if component == "transformer" and _WHOLE.fullmatch(rest) else None


def _main_component(keys: Iterable[str]) -> str:
    """The component that keys and config entries without one are of."""
    keys = list(keys)
    named = {key.partition(".")[0] for key in keys}
    first = next((component for component in COMPONENTS if component in named), None)
    return first or ("unet" if not keys or any(map(_BARE_UNET.match, keys)) else "transformer")


def _grouped(modules: Mapping[ModuleRef, Any]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for component, path in modules:
        grouped.setdefault(component, []).append(path)
    return grouped


def component_configs(metadata: Mapping[str, str], unprefixed: str = "") -> dict[str, dict[str, Any]]:
    """Component → LoraConfig fields, from a header's ``lora_adapter_metadata``; empty where there is none.

    Fields without a component count as those of ``unprefixed``.
    """
    configs: dict[str, dict[str, Any]] = {}
    for name, value in json.loads(metadata.get(METADATA, "{}")).items():
        component, dot, field = name.partition(".")
        if not dot:
            component, field = unprefixed, name
        configs.setdefault(component, {})[field] = value
    return configs


def _configs(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    try:
        configs = component_configs(metadata)
    except (ValueError, AttributeError):
        what = "is not a JSON object"
        raise InputError(what, file=file, key=METADATA, remedy="Save the adapter again.") from None
    for component, config in configs.items():
        check_config(config, file, f"{METADATA}: {component}." if component else f"{METADATA}: ")
    return configs


def _low_rank(
    module: ModuleRef, part: Parts, alpha: float | None, config: Mapping[str, Any] | None, file: Path
) -> LowRank:
    up, down = part.check_pair(file)
    rank = down.shape[0]
    if alpha is not None:
        scale = alpha / rank
    else:
        scale = 1.0 if config is None else scale_of(config, module.path, rank)
    magnitude = part.tensors.get("magnitude")
    if magnitude is not None and not part.keys["magnitude"].endswith("dora_scale"):
        magnitude = flat(magnitude)
    return LowRank(up, down, scale, part.tensors.get("alpha"), magnitude, part.tensors.get("bias"))


def _write(adapter: Adapter) -> Written:
    own = adapter.format == "diffusers"
    token_keys: TokenKeys = adapter.layout.get("tokens", {}) if own else {}
    for token in adapter.tokens:
        if token not in token_keys:
            # diffusers' own loader passes them over: only a file that had them keeps them.
            raise cannot_hold("diffusers", "embeddings of added tokens", token)
    components: dict[str, dict[str, LowRank]] = {}
    tensors: dict[str, TensorRef] = bundled(adapter.tokens, token_keys)
    for module, update in adapter.updates.items():
        component = component_for(adapter, module.component, "diffusers")
        if isinstance(update, Full) and component == "transformer" and _WHOLE.fullmatch(module.path):
            tensors[_stem(adapter.layout if own else {}, component, module.path)] = update.value
            continue
        if isinstance(update, Full):
            remedy = "Keep PEFT's format."
            raise cannot_hold("diffusers", "parameters stored whole, but for norms of query and key", module, remedy)
        if not isinstance(update, LowRank):
            raise cannot_hold("diffusers", f"{update.kind} updates", module)
        if update.orientation != "weight":
            remedy = "Keep PEFT's format."
            raise cannot_hold("diffusers", "updates of embeddings or Conv1D layers", module, remedy)
        components.setdefault(component, {})[module.path] = update
    for component, updates in components.items():
        # diffusers asks once for a whole component whether there are biases, and leaves those that it doesn't find
        # without a value.
        biased = any(update.bias is not None for update in updates.values())
        for path, update in updates.items():
            whole = replace(update, bias=_no_bias(update)) if biased and update.bias is None else update
            tensors |= _keys(adapter.layout if own else {}, component, path, whole)
    if own:
        true_alphas = alphas_of({module: u for module, u in adapter.updates.items() if isinstance(u, LowRank)})
        tensors |= {f"{_stem(adapter.layout, *module)}.alpha": ref for module, ref in true_alphas.items()}
    metadata = dict(adapter.metadata) if own else {"format": "pt", **training_metadata(adapter.metadata)}
    configs = _written_configs(adapter, components)
    if configs:
        unprefixed = adapter.layout.get("unprefixed") if own else None
        entries = {
            field if name == unprefixed else f"{name}.{field}": value
            for name, config in configs.items()
            for field, value in config.items()
        }
        metadata[METADATA] = json.dumps(entries, indent=2, sort_keys=True)
    loaded = contiguous(tensors)
    return Written(loaded, with_true_hashes(metadata, loaded))


def _no_bias(update: LowRank) -> TensorRef:
    return InMemory(torch.zeros(update.up.shape[0], dtype=update.up.dtype))


def _keys(layout: Mapping[str, Any], component: str, path: str, update: LowRank) -> dict[str, TensorRef]:
    generation = chosen(layout.get("generations", {}), component, path, "lora_A")
    stem = _stem(layout, component, path)
    down_key, up_key = (f"{stem}{suffix}" for suffix in _PAIRS.get(generation, _PAIRS["lora_A"]))
    if generation in ("processor", "attention"):
        down_key, up_key = _processor_keys(stem, generation) or (down_key, up_key)
    keys = {down_key: update.down, up_key: update.up}
    if update.bias is not None:
        keys[f"{stem}.lora_B.bias"] = update.bias
    if update.magnitude is not None:
        suffix = chosen(layout.get("magnitudes", {}), component, path, _MAGNITUDES[0])
        plain = suffix == ".dora_scale"
        keys[f"{stem}{suffix}"] = (
            update.magnitude if plain else magnitude_per_output(update, "diffusers", f"{component}.{path}")
        )
    return keys


def _stem(layout: Mapping[str, Any], component: str, path: str) -> str:
    return path if layout.get("bare") else f"{component}.{path}"


def _processor_keys(stem: str, generation: str) -> tuple[str, str] | None:
    parts = _UNET_PARTS if generation == "processor" else _TEXT_PARTS
    for part, name in parts.items():
        if stem.endswith(f".{name}"):
            head = stem.removesuffix(name) + ("processor." if generation == "processor" else "")
            return f"{head}to_{part}_lora.down.weight", f"{head}to_{part}_lora.up.weight"
    return None


def _written_configs(adapter: Adapter, components: Mapping[str, Mapping[str, LowRank]]) -> dict[str, dict[str, Any]]:
    """The header's config per component: the old one corrected, or a new one where a scale needs it.

    diffusers takes the header for all components or for none, so that one of them needing it brings in the rest.
    """
    own = adapter.format == "diffusers"
    old = component_configs(adapter.metadata, adapter.layout.get("unprefixed", "")) if own else {}
    old_modules = adapter.layout.get("modules", {}) if own else {}
    silent = all(
        update.scale == 1.0 or (own and update.alpha is not None)
        for updates in components.values()
        for update in updates.values()
    )
    if not old and silent:
        return {}
    written = {}
    for component, updates in components.items():
        # In a text encoder the names must match with and without text_model., so patterns can't start at its root.
        text = component.startswith("text_encoder")
        named = {without_text_model(path) if text else path: update for path, update in updates.items()}
        keep = component in old and set(old_modules.get(component, ())) == set(updates)
        before = old.get(component, MINIMAL)
        config = corrected(before, named, keep_targets=keep)
        for field in ("rank_pattern", "alpha_pattern") if text else ():
            if config.get(field) != before.get(field):
                config[field] = {pattern.removeprefix("^"): value for pattern, value in config[field].items()}
        written[component] = config
    return written


FORMAT = Format("diffusers", "diffusers pipeline LoRA (pytorch_lora_weights)", 80, _detect, _read, _write)
