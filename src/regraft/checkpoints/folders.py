"""Folders of transformers (``config.json`` + weights) and diffusers (``model_index.json`` + component folders)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.adapter import MODEL
from regraft.checkpoints import Checkpoint, Reader
from regraft.checkpoints.shards import read_shards
from regraft.errors import InputError
from regraft.limits import read_json_object
from regraft.tensors import TensorRef, read_tensor_file

# Weights' names in the order in which the libraries themselves look for them.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
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


def _weights(folder: Path) -> dict[str, TensorRef] | None:
    for stem in _STEMS:
        for suffix in (".safetensors", ".bin"):
            # "fp16" is the only variant in wide use; it stands in for the full file where that is absent.
            for variant in ("", ".fp16"):
                single = folder / f"{stem}{variant}{suffix}"
                index = folder / f"{stem}{suffix}.index{variant}.json"
                if single.is_file():
                    return dict(read_tensor_file(single).tensors)
                if index.is_file():
                    return read_shards(index)
    return None


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        return {}
    return read_json_object(file)


def _detect(path: Path) -> bool:
    return path.is_dir()


def _read(path: Path) -> Checkpoint:
    components: dict[str, dict[str, TensorRef]] = {}
    configs: dict[str, dict[str, Any]] = {}
    own = _weights(path)
    folders = {MODEL: path} if own is not None else {name: path / name for name in COMPONENTS}
    for name, folder in folders.items():
        weights = own if own is not None else (_weights(folder) if folder.is_dir() else None)
        if weights is not None:
            components[name], configs[name] = weights, _config(folder)
    if not components:
        single = sorted(path.glob("*.safetensors"))
        if len(single) == 1:
            return Checkpoint({MODEL: read_tensor_file(single[0]).tensors}, {MODEL: _config(path)})
        raise InputError(
            "this folder holds no model weights",
            file=path,
            remedy=f"Expected {_STEMS[1]}.safetensors, or component folders such as unet/ with weights in them.",
        )
    return Checkpoint(components, configs)


READER = Reader("folder", 30, _detect, _read)
