"""Names and shapes of any diffusers or transformers model, from its ``config.json`` alone.

The library's own class is built on the meta device: no weight is read or allocated, no code is taken from anywhere but
the installed library, so that a family that regraft has no table of still works by its own names.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from regraft.errors import InputError, first_line, reading
from regraft.tensors import Shape

# A config is a stranger's: one that asks for this much is a mistake or an attack, and would take hours to build.
_MOST_LAYERS, _MOST_PARAMETERS = 1_000, 10**13
_DEPTHS = ("layers", "blocks", "depth", "experts")


def read_config(path: str | Path) -> dict[str, Any]:
    """A model's ``config.json``: the file, or that of its folder.

    Raises:
        InputError: it can't be read, or is no object.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    with reading(file):
        config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise InputError("a model's config is an object of settings", file=file)
    return config


def parameters_of(config: Mapping[str, Any], *, file: str | Path | None = None) -> dict[str, Shape]:
    """Parameter name → shape of the model that a config describes, in the order of its state dict.

    Tied parameters are listed under each of their names; files may hold only one of them.

    Args:
        config: a ``config.json`` of diffusers (``_class_name``) or transformers (``architectures``, ``model_type``).
        file: where it comes from, for errors.

    Raises:
        InputError: the class is unknown to the installed library, or needs code from elsewhere, or the settings do not
            make a model.
    """
    _check_size(config, file)
    build = _diffusers if "_class_name" in config else _transformers
    try:
        with torch.device("meta"), _quiet():
            model = build(dict(config), file)
    except InputError:
        raise
    except Exception as error:  # a library fails in its own ways on settings that don't fit together
        raise InputError(f"these settings do not make a model ({first_line(error)})", file=file) from error
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if sum(torch.Size(shape).numel() for shape in shapes.values()) > _MOST_PARAMETERS:
        raise InputError("these settings make a model of absurd size", file=file)
    return shapes


def _check_size(config: Mapping[str, Any], file: str | Path | None) -> None:
    for key, value in _numbers(config):
        if any(word in key for word in _DEPTHS) and value > _MOST_LAYERS:
            raise InputError(f"{value} is no number of layers", file=file, key=key)


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, (list, tuple)):
            yield from ((key, entry) for entry in value if isinstance(entry, int))
        elif isinstance(value, int):
            yield key, value


def _diffusers(config: dict[str, Any], file: str | Path | None) -> torch.nn.Module:
    library = _library("diffusers", file)
    name = str(config["_class_name"])
    kind: Any = getattr(library, name, None)
    if not (isinstance(kind, type) and issubclass(kind, library.ModelMixin)):
        raise _unknown(name, "diffusers", library, file)
    made: Any = kind
    model: torch.nn.Module = made.from_config(config)
    return model


def _transformers(config: dict[str, Any], file: str | Path | None) -> torch.nn.Module:
    library = _library("transformers", file)
    names = config.get("architectures") or []
    name = str(names[0]) if isinstance(names, list) and names else ""
    kind: Any = getattr(library, name, None) if name else None
    config_class: Any = getattr(kind, "config_class", None)
    if isinstance(kind, type) and issubclass(kind, library.PreTrainedModel) and config_class is not None:
        model: torch.nn.Module = kind(config_class.from_dict(config))
        return model
    model_type = str(config.get("model_type") or "")
    if not name and model_type in library.CONFIG_MAPPING:
        made: torch.nn.Module = library.AutoModel.from_config(
            library.CONFIG_MAPPING[model_type].from_dict(config), trust_remote_code=False
        )
        return made
    raise _unknown(name or model_type or "no class", "transformers", library, file, remote="auto_map" in config)


def _library(name: str, file: str | Path | None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        remedy = "Install it: pip install 'regraft[run]'."
        raise InputError(
            f"a model of {name} is known by its config only where {name} is installed", file=file, remedy=remedy
        ) from None


def _unknown(name: str, library: str, module: Any, file: str | Path | None, *, remote: bool = False) -> InputError:
    what = f"{library} {module.__version__} has no model class {name}"
    if remote:
        what += ", and the code that the config points to is never run"
    return InputError(
        what,
        file=file,
        key="_class_name" if library == "diffusers" else "architectures",
        remedy=f"Give the base itself, or install a {library} that has it.",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remarks on settings that a mere list of names does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
