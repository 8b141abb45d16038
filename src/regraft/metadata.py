"""What an adapter's header tells about itself: kept true after a change, and what is private taken out.

Facts (sd-scripts 48d368f, Musubi 30c658c, OneTrainer 23df3832, ai-toolkit, ComfyUI 0.3.64):

- ``ss_sd_model_name`` is the base's file name, or a hub id; ``ss_sd_model_hash`` the first 8 digits of the SHA-256 of
  64 KiB from offset 1 MiB of that file, ``ss_new_sd_model_hash`` the SHA-256 of all of it (AutoV2 is its first 10
  digits). A base in a folder has neither.
- ``ss_network_dim`` and ``ss_network_alpha`` hold for the linear layers, ``conv_dim`` and ``conv_alpha`` in
  ``ss_network_args`` for kernels; sd-scripts' resize writes ``Dynamic`` where they vary.
- ``modelspec.architecture`` ends in ``/lora``; ``modelspec.title`` must be there, and is ``LoRA`` by default.
- Folders, captions and prompts stand in ``ss_datasets``, ``ss_dataset_dirs``, ``ss_tag_frequency`` (sd-scripts),
  ``ot_config`` (OneTrainer), ``prompt`` and ``workflow`` (ComfyUI's save nodes).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regraft.adapter import Adapter
from regraft.families import get_family
from regraft.filehash import computed_hashes, legacy_hash
from regraft.formats.cloneofsimo import EMBEDDED
from regraft.formats.diffusers import METADATA as DIFFUSERS_CONFIGS
from regraft.updates import LowRank, Update

_BASE_NAME = "ss_sd_model_name"
_BASE_HASHES = ("ss_sd_model_hash", "ss_new_sd_model_hash")
DYNAMIC = "Dynamic"

#: Names of people and things, folders, captions, prompts: taken out as a whole.
PRIVATE = frozenset(
    {
        "ss_output_name",
        "ss_training_comment",
        "ss_session_id",
        "ss_datasets",
        "ss_dataset_dirs",
        "ss_reg_dataset_dirs",
        "ss_tag_frequency",
        "modelspec.author",
        "modelspec.description",
        "modelspec.usage_hint",
        "modelspec.tags",
        "modelspec.trigger_phrase",
        "modelspec.thumbnail",
        "modelspec.merged_from",
        "ot_config",
        "prompt",
        "workflow",
        "name",
        "training_info",
    }
)
# What other trainers may call such things.
_PRIVATE_WORDS = re.compile(r"prompt|comment|author|e-?mail|user|caption|tags?$|dirs?$|paths?$|folder", re.IGNORECASE)
_HARMLESS = re.compile(r"\s*(-?[\d.]+(e-?\d+)?|true|false|none|null|)\s*", re.IGNORECASE)
# A folder of somebody's machine, anywhere in a value; not a web address.
_FOLDER = re.compile(r"(?<![\w:/.])(?:~?/[\w.@ +-]+/[\w./@ +-]+|\\\\[\w.-]+\\|[A-Za-z]:[\\/]+[\w.@ +-]+)")
# Files beside a PEFT adapter that it needs to run, or that say what one may do with it.
_NEEDED_FILES = re.compile(
    r"(tokenizer.*\.json|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template\..*|.*\.model|"
    r"(generation_|preprocessor_|processor_)?config\.json|(LICENSE|NOTICE|COPYING).*)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class BaseName:
    """A base as metadata may speak of it.

    Attributes:
        name: file name or hub id.
        path: where it lies, if it does lie here.
        family: name of its family, or None.
    """

    name: str
    path: Path | None
    family: str | None

    @classmethod
    def of(cls, path: str, family: str | None, name: str | None = None) -> BaseName:
        """From a path or hub id, as a base's record has it; by another ``name`` where there is one."""
        place = Path(path).expanduser()
        here = place.exists()
        return cls(name or (place.name if here else path), place if here else None, family)


def with_base(metadata: Mapping[str, str], base: BaseName, *, old_family: str | None) -> dict[str, str]:
    """The metadata, true for another base: entries that can't be known for it are left out, none is added.

    Args:
        metadata: the safetensors header's.
        base: the new one.
        old_family: of the adapter so far; what names only the family stays if that does.
    """
    result = dict(metadata)
    if _BASE_NAME in result:
        result[_BASE_NAME] = base.name
    wanted = [key for key in _BASE_HASHES if key in result]
    if wanted:
        known = base_hashes(base.path) if base.path is not None and base.path.is_file() else {}
        for key in wanted:
            result = {**result, key: known[key]} if key in known else _without(result, key)
    data = family.data if (family := get_family(base.family)) else {}
    same = base.family is not None and base.family == old_family
    version, architecture = data.get("ss_base_model_version"), data.get("modelspec")
    known_now = {
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")) if version else None,
        "modelspec.architecture": f"{architecture}/lora" if architecture else None,
    }
    for key, value in known_now.items():
        if key in result and value is not None:
            result[key] = value
        elif key in result and not same:
            del result[key]
    if DIFFUSERS_CONFIGS in result:
        result[DIFFUSERS_CONFIGS] = _with_base_name(result[DIFFUSERS_CONFIGS], base.name)
    return result


def _with_base_name(text: str, name: str) -> str:
    """diffusers' config entries, with the new base's name where they had one."""
    entries = _object(text) or {}
    old = {key for key, value in entries.items() if key.endswith("base_model_name_or_path") and value}
    renamed = {**entries, **dict.fromkeys(old, name)}
    return text if renamed == entries else json.dumps(renamed, indent=2, sort_keys=True)


def base_hashes(file: Path) -> dict[str, str]:
    """Both hashes that sd-scripts keeps of a base's file, by their metadata keys."""
    return {"ss_sd_model_hash": legacy_hash(file), "ss_new_sd_model_hash": computed_hashes(file).sha256}


def with_ranks(metadata: Mapping[str, str], updates: Iterable[Update]) -> dict[str, str]:
    """The metadata with kohya's statements of rank and alpha true for these updates, where it makes any."""
    if not any(key.startswith("ss_network_") for key in metadata):
        return dict(metadata)
    low_rank = [update for update in updates if isinstance(update, LowRank)]
    kernels = [update for update in low_rank if any(size != 1 for size in update.shape[2:])]
    linear = [update for update in low_rank if not any(size != 1 for size in update.shape[2:])] or kernels
    result = dict(metadata)
    if linear:
        result |= _stated(result, "ss_network_dim", "ss_network_alpha", linear)
    arguments = _object(metadata.get("ss_network_args"))
    if kernels and arguments and "conv_dim" in arguments:
        arguments |= _stated(arguments, "conv_dim", "conv_alpha", kernels)
        result["ss_network_args"] = json.dumps(arguments)
    return result


def _stated(before: Mapping[str, Any], rank: str, alpha: str, updates: Sequence[LowRank]) -> dict[str, str]:
    """What is to be stated of these updates, in the old words where they are true."""
    values = {rank: {float(u.rank) for u in updates}, alpha: {float(f"{u.scale * u.rank:.6g}") for u in updates}}
    return {
        key: (
            DYNAMIC if len(found) > 1 else str(before[key]) if _number(before.get(key)) in found else f"{min(found):g}"
        )
        for key, found in values.items()
    }


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def strip_private(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """The adapter without paths, names, prompts and tag lists, and what was taken out or shortened.

    Added tokens keep their names, without which they can't be used.
    """
    removed: list[str] = []
    metadata: dict[str, str] = {}
    for key, value in sorted(adapter.metadata.items()):
        kept = _public_value(key, value)
        if kept is not None:
            metadata[key] = kept
        if kept != value:
            removed.append(key if kept is None else f"{key} (shortened)")
    before = adapter.config
    config = None if before is None else {key: _public_leaf(value) for key, value in before.items()}
    if config is not None and before is not None:
        changed = sorted(key for key in config if config[key] != before[key])
        removed += [f"adapter_config.json: {key} (shortened)" for key in changed]
    sidecars = {name: file for name, file in adapter.sidecars.items() if _NEEDED_FILES.fullmatch(name)}
    removed += sorted(adapter.sidecars.keys() - sidecars.keys())
    return replace(adapter, metadata=metadata, config=config, sidecars=sidecars), removed


def _public_value(key: str, value: str) -> str | None:
    """A metadata value that may be shown to anybody, or None."""
    if key == DIFFUSERS_CONFIGS:
        entries = _object(value)
        shown = {name: _public_leaf(entry) for name, entry in entries.items()} if entries is not None else None
        return value if shown == entries else json.dumps(shown, indent=2, sort_keys=True)
    if value == EMBEDDED:
        return value
    if key == "modelspec.title":
        return "LoRA"
    if key in ("ss_sd_model_name", "ss_vae_name"):
        return str(_public_leaf(value))
    if key in PRIVATE or _FOLDER.search(value):
        return None
    return None if _PRIVATE_WORDS.search(key) and not _HARMLESS.fullmatch(value) else value


def _public_leaf(value: Any) -> Any:
    """A path cut to its last part; anything else as it is."""
    if isinstance(value, str) and (_FOLDER.match(value) or value.startswith(("/", "~", "./", "../", ".\\", "..\\"))):
        return re.split(r"[/\\]+", value.rstrip("/\\"))[-1]
    return value


def _object(text: str | None) -> dict[str, Any] | None:
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _without(metadata: Mapping[str, str], key: str) -> dict[str, str]:
    return {name: value for name, value in metadata.items() if name != key}
