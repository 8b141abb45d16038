"""A base as the class that it is made for: a transformers model, a diffusers U-Net or pipeline. Never from afar."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regraft.adapter import MODEL
from regraft.checkpoints import open_checkpoint
from regraft.checkpoints.quantised import is_read
from regraft.errors import InputError, RegraftError, first_line, reading
from regraft.runtime.classes import (
    diffusers_class,
    read_config,
    transformers_class,
    transformers_config,
    unet_class,
    unquantised,
)
from regraft.runtime.libraries import library, quiet_libraries

#: What a model gives: logits over a vocabulary, hidden states, or a prediction of noise.
Kind = Literal["language", "encoder", "denoiser"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)
#: Components of a pipeline that predict noise.
DENOISERS = ("unet", "transformer", "prior")
_COMPONENTS = (*DENOISERS, "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass
class Loaded:
    """A model, or a pipeline's models, ready to run.

    Attributes:
        components: component → model, in eval mode.
        kind: what it gives.
        name: its class.
        path: where it was read from.
        tokenizer: of a transformers folder, where it has one.
        pipeline: the diffusers pipeline around the components.
    """

    components: dict[str, nn.Module]
    kind: Kind
    name: str
    path: Path
    tokenizer: Any = None
    pipeline: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def to(self, device: str) -> None:
        """Move all of it."""
        self.device = _device(device)
        if self.pipeline is not None:
            self.pipeline.to(self.device)
        for model in self.components.values():
            model.to(self.device)

    @property
    def main(self) -> Any:
        """The model whose output is measured: the denoiser of a pipeline, else the only one."""
        for name in DENOISERS:
            if name in self.components:
                return self.components[name]
        return next(iter(self.components.values()))

    @property
    def main_name(self) -> str:
        return next(name for name, model in self.components.items() if model is self.main)


def load_model(
    path: str | Path, *, config: str | Path | None = None, device: str = "cpu", dtype: str = "float32"
) -> Loaded:
    """Load a base with the library that it belongs to.

    Args:
        path: a diffusers pipeline or model folder, a transformers folder, or a bare weights file.
        config: ``config.json`` of a bare weights file, or the folder that holds it (and perhaps a tokenizer); by
            default the file's own folder.
        device: ``cpu``, ``cuda`` or ``mps``.
        dtype: name of the dtype that it runs in.

    Raises:
        InputError: there is no such base, its weights don't fit its config, or its class can't be told.
        RegraftError: transformers or diffusers is not installed, or the device is not there.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError("no such file or folder", file=path, remedy="Check the path of the base.")
    precision = _dtype(dtype)
    _device(device)
    # The fast path of nn.TransformerEncoder reads its weights past our replaced parameters' autograd state.
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        if path.is_file() and path.name.endswith(".index.json"):
            path = path.parent
        loaded = _folder(path, precision) if path.is_dir() else _file(path, config, precision)
    loaded.to(device)
    for model in loaded.components.values():
        model.eval().requires_grad_(False)
    return loaded


def _folder(path: Path, dtype: torch.dtype) -> Loaded:
    if (path / "model_index.json").is_file():
        return _pipeline(path, dtype)
    config = read_config(path)
    if is_read(config):
        # The libraries would keep the packed weights, which no adapter can be merged into.
        return _file(path, path, dtype)
    if "_class_name" in config:
        cls = unet_class(config, path)
        with reading(path), quiet_libraries():
            model = cls.from_pretrained(str(path), torch_dtype=dtype, local_files_only=True)
        return _denoiser(model, path)
    cls = transformers_class(config)
    with _config_in_order(path), reading(path), quiet_libraries(), _fitting_shapes(path):
        model, info = cls.from_pretrained(str(path), dtype=dtype, local_files_only=True, output_loading_info=True)
    _check_keys(info["missing_keys"], (), path)
    return Loaded({MODEL: model}, _kind(model), type(model).__name__, path, _tokenizer(path))


def _pipeline(path: Path, dtype: torch.dtype) -> Loaded:
    diffusers = library("diffusers")
    with reading(path / "model_index.json"):
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    # The safety checker would cost memory, and black out pictures that are made here only to be compared.
    without = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    with reading(path), quiet_libraries():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            str(path), torch_dtype=dtype, local_files_only=True, **without, **_stored_quantised(path, index, dtype)
        )
    return _around(pipeline, path)


def _stored_quantised(path: Path, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, nn.Module]:
    """A pipeline's components whose weights are stored quantised, as those that they stand for (see `_folder`)."""
    found: dict[str, nn.Module] = {}
    for name in _COMPONENTS:
        place = path / name
        if name not in index or not (place / "config.json").is_file():
            continue
        fields = read_config(place)
        if not is_read(fields):
            continue
        if "_class_name" in fields:
            found[name] = _filled(diffusers_class(fields, place), fields, place, dtype)
        else:
            found[name] = _file(place, place, dtype).main
    return found


def _around(pipeline: Any, path: Path) -> Loaded:
    pipeline.set_progress_bar_config(disable=True)
    components = {name: getattr(pipeline, name, None) for name in _COMPONENTS}
    models = {name: model for name, model in components.items() if isinstance(model, nn.Module)}
    if not any(name in models for name in DENOISERS):
        raise InputError(f"{type(pipeline).__name__} has no denoiser that could be measured", file=path)
    return Loaded(models, "denoiser", type(pipeline).__name__, path, pipeline=pipeline)


def _denoiser(model: nn.Module, path: Path) -> Loaded:
    return Loaded({"unet": model}, "denoiser", type(model).__name__, path)


def _file(path: Path, config: str | Path | None, dtype: torch.dtype) -> Loaded:
    place = Path(config).expanduser() if config is not None else path.parent
    if not (place.is_file() or (place / "config.json").is_file() or (place / "model_index.json").is_file()):
        raise InputError(
            "a bare weights file does not say which model it is for",
            file=path,
            remedy="Give its config.json, or a folder with one, with --config; or name the model's folder instead.",
        )
    if place.is_dir() and (place / "model_index.json").is_file() and not (place / "config.json").is_file():
        return _single_file_pipeline(path, place, dtype)
    fields = read_config(place)
    if "_class_name" in fields:
        return _denoiser(_filled(unet_class(fields, place), fields, path, dtype), path)
    state = _state_of(path)
    cls, settings = transformers_class(fields), transformers_config(fields, place)
    # The Auto classes want a folder; their table gives the class itself.
    cls = cls._model_mapping[type(settings)] if hasattr(cls, "_model_mapping") else cls
    with _fitting_shapes(path), quiet_libraries():
        model, info = cls.from_pretrained(
            None, config=settings, state_dict=state, dtype=dtype, output_loading_info=True
        )
    _check_keys(info["missing_keys"], info["unexpected_keys"], path)
    return Loaded({MODEL: model}, _kind(model), type(model).__name__, path, _tokenizer(place))


def _single_file_pipeline(path: Path, place: Path, dtype: torch.dtype) -> Loaded:
    """A single-file checkpoint, as the web interfaces use them, with a diffusers folder that says what it is."""
    with reading(place / "model_index.json"):
        index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
    if not isinstance(index, dict):
        raise InputError("is no pipeline's index", file=place / "model_index.json")
    cls: Any = getattr(library("diffusers"), str(index.get("_class_name")), None)
    if not hasattr(cls, "from_single_file"):
        raise InputError(f"{index.get('_class_name')} can't be read from a single file", file=path)
    try:
        with quiet_libraries():
            pipeline = cls.from_single_file(str(path), config=str(place), torch_dtype=dtype, local_files_only=True)
    except Exception as error:
        raise InputError(f"does not fit the pipeline of {place} ({first_line(error)})", file=path) from error
    return _around(pipeline, path)


def _filled(cls: Any, fields: Mapping[str, Any], path: Path, dtype: torch.dtype) -> nn.Module:
    """A diffusers model of these fields with a checkpoint's weights."""
    model: nn.Module = cls.from_config(unquantised(fields))
    with _fitting_shapes(path):
        result = model.load_state_dict(_state_of(path), strict=False)
    _check_keys(result.missing_keys, result.unexpected_keys, path)
    return model.to(dtype)


def _state_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint of one model, by name; quantised ones as plain weights."""
    components = open_checkpoint(path).components
    tensors = components.get(MODEL, {}) if len(components) != 1 else next(iter(components.values()))
    return {name: ref.load() for name, ref in tensors.items()}


@contextmanager
def _config_in_order(path: Path) -> Iterator[None]:
    """Turn what transformers finds wrong with a config into an error that names the base."""
    # Its checks of a config raise an error of their own, which is none of Python's own kinds.
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except StrictDataclassError as error:
        what = str(error.__cause__ or error).strip().partition("\n")[0]
        raise InputError(
            f"its config.json makes no model ({what})", file=path, remedy="Get the config of this very model."
        ) from error


@contextmanager
def _fitting_shapes(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        what = lines[0] if lines else first_line(error)
        raise InputError(
            f"its tensors don't have the shapes of the config ({what})",
            file=path,
            remedy="Give the config.json of this very model with --config.",
        ) from None


# Buffers that some versions save and others compute; a pooler that a head's class does without.
_HARMLESS = re.compile(r"(position_ids|rotary_emb\.inv_freq|attn\.bias|masked_bias)$|(^|\.)pooler\.")


def _check_keys(missing: Any, unexpected: Any, path: Path) -> None:
    for keys, what in ((missing, "lacks"), (unexpected, "has, beyond what its config asks for,")):
        left = sorted(key for key in keys if not _HARMLESS.search(key))
        if left:
            some = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
            raise InputError(
                f"{what} {len(left)} tensors: {some}",
                file=path,
                remedy="Give the config.json of this very model with --config, or name its folder.",
            )


def _kind(model: nn.Module) -> Kind:
    name = type(model).__name__
    generates = name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    return "language" if generates else "encoder"


def _tokenizer(place: Path) -> Any:
    folder = place if place.is_dir() else place.parent
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    with reading(folder):
        return library("transformers").AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _device(name: str) -> torch.device:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = name.partition(":")[0]
    if not there.get(kind, False):
        raise RegraftError(f"there is no device {name!r} here", remedy="Use --device cpu.")
    return torch.device(name)


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name not in known:
        raise RegraftError(f"no dtype is named {name!r}", remedy=f"Known: {', '.join(known)}.")
    return known[name]
