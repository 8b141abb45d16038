"""Folders of transformers (``config.json`` + weights) and diffusers (``model_index.json`` + component folders)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.adapter import MODEL
from regraft.checkpoints import Checkpoint, Reader, open_checkpoint
from regraft.checkpoints._files import describe, kept_inside, read_plain
from regraft.checkpoints.quantised import Plain
from regraft.checkpoints.shards import read_plain_shards
from regraft.checkpoints.single_file import split_components
from regraft.errors import InputError
from regraft.limits import read_json_object

# Weights' names in the order in which the libraries themselves look for them.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
# Variants in wide use; one stands in for the full file where that is absent.
_VARIANTS = ("", ".fp16", ".bf16")
# Components that adapters change; the autoencoder and the safety checker are never touched by one.
COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
)
# Wan 2.2 as its makers publish it: two experts, in the order in which diffusers has them.
_EXPERTS = {"high_noise_model": "transformer", "low_noise_model": "transformer_2"}


def _weights(folder: Path, config: Mapping[str, Any]) -> tuple[Plain, str] | None:
    for stem in _STEMS:
        for suffix in (".safetensors", ".bin"):
            for variant in _VARIANTS:
                single = folder / f"{stem}{variant}{suffix}"
                index = folder / f"{stem}{suffix}.index{variant}.json"
                if single.is_file():
                    return read_plain(kept_inside(single, folder), config)
                if index.is_file():
                    return read_plain_shards(index, config)
    return None


def _table(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    return read_json_object(file)


def _config(folder: Path) -> dict[str, Any]:
    """``config.json``, with what GPTQ's tools may keep beside it."""
    config = _table(folder / "config.json")
    beside = _table(folder / "quantize_config.json")
    return {"quantization_config": beside, **config} if beside else config


def _detect(path: Path) -> bool:
    return path.is_dir()


def _only_file(folder: Path) -> Path | None:
    """The one weights file of a folder without a usual name, or the first part of the one split model."""
    for pattern in ("*.safetensors", "*.gguf"):
        files = [file for file in sorted(folder.glob(pattern)) if not _later_part(file)]
        if len(files) == 1:
            return kept_inside(files[0], folder)
    return None


def _later_part(file: Path) -> bool:
    return "-of-" in file.stem and not file.stem.partition("-of-")[0].endswith("-00001")


def _read(path: Path) -> Checkpoint:
    own = _config(path)
    found = _weights(path, own)
    if found is not None:
        plain, description = found
        # The makers' own folders (Wan, Hunyuan) have diffusers' file names, and the original tensor names in them.
        components, rest = split_components(plain.tensors)
        return Checkpoint(components, {next(iter(components)): own}, description, plain.left_out + rest)
    return _components(path) or _single(path, own)


def _components(path: Path) -> Checkpoint | None:
    """A diffusers pipeline's folders, each with its own weights and config."""
    weights: dict[str, Plain] = {}
    configs, kinds = {}, []
    for folder, name in {**dict(zip(COMPONENTS, COMPONENTS, strict=True)), **_EXPERTS}.items():
        config = _config(path / folder)
        found = None if name in weights else _weights(path / folder, config)
        if found is not None:
            weights[name], configs[name] = _renamed(found[0]) if folder in _EXPERTS else found[0], config
            kinds += found[1].split(", ")
    if not weights:
        return None
    left_out = tuple(f"{component}/{name}" for component, plain in weights.items() for name in plain.left_out)
    return Checkpoint({name: plain.tensors for name, plain in weights.items()}, configs, describe(kinds), left_out)


def _renamed(plain: Plain) -> Plain:
    """A model in its makers' names by diffusers' ones."""
    components, rest = split_components(plain.tensors)
    return Plain(next(iter(components.values())), plain.kinds, plain.left_out + rest)


def _single(path: Path, own: Mapping[str, Any]) -> Checkpoint:
    """The one weights file of a folder, whatever its name."""
    single = _only_file(path)
    if single is None:
        raise InputError(
            "this folder holds no model weights",
            file=path,
            remedy=f"Expected {_STEMS[1]}.safetensors, or component folders such as unet/ with weights in them.",
        )
    checkpoint = open_checkpoint(single)
    if own and MODEL in checkpoint.components:
        return replace(checkpoint, configs={MODEL: {**checkpoint.configs.get(MODEL, {}), **own}})
    return checkpoint


READER = Reader("folder", 30, _detect, _read)
