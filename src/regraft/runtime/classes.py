"""Which class of which library a base is made for, and with which config: read from its ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.errors import InputError, reading
from regraft.runtime.libraries import library


def read_config(place: Path) -> dict[str, Any]:
    """The fields of a ``config.json``.

    Args:
        place: the file, or the folder that holds it.

    Raises:
        InputError: there is none, or it is no model's.
    """
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise InputError("there is no config.json to tell the model's class by", file=place)
    with reading(file):
        config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not ({"_class_name", "architectures", "model_type"} & set(config)):
        raise InputError("is no config of a transformers or diffusers model", file=file)
    return config


def diffusers_class(config: Mapping[str, Any], path: Path) -> Any:
    """The class that a diffusers config names.

    Raises:
        InputError: this version of diffusers does not have it.
    """
    name = str(config["_class_name"])
    cls = getattr(library("diffusers"), name, None)
    if cls is None:
        raise InputError(f"this version of diffusers has no {name}", file=path, remedy="Upgrade diffusers.")
    return cls


def unet_class(config: Mapping[str, Any], path: Path) -> Any:
    """Likewise, of a model that runs without a pipeline.

    Raises:
        InputError: it is another one.
    """
    cls, name = diffusers_class(config, path), str(config["_class_name"])
    if not name.startswith("UNet"):
        raise InputError(
            f"a {name} alone can't be run: its inputs come from the pipeline",
            file=path,
            remedy="Give the pipeline's folder (the one with model_index.json).",
        )
    return cls


def transformers_class(config: Mapping[str, Any]) -> Any:
    """The first class of a transformers config that this version has; else an Auto class."""
    transformers = library("transformers")
    for name in config.get("architectures") or ():
        cls = getattr(transformers, str(name), None)
        if cls is not None:
            return cls
        if str(name).endswith(("ForCausalLM", "LMHeadModel")):
            return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def transformers_config(fields: Mapping[str, Any], place: Path) -> Any:
    """A config of the class that goes with its model type.

    Raises:
        InputError: this version of transformers does not know the type.
    """
    transformers = library("transformers")
    kind = fields.get("model_type")
    if kind is None or kind not in transformers.CONFIG_MAPPING:
        raise InputError(f"this version of transformers has no model type {kind!r}", file=place)
    return transformers.CONFIG_MAPPING[kind].from_dict(unquantised(fields))


def unquantised(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the weights that quantised ones stand for."""
    return {name: value for name, value in fields.items() if name != "quantization_config"}
