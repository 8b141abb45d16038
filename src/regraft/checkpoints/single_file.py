"""One weights file: safetensors, or a PyTorch state dict; a whole diffusion checkpoint by its components.

Web interfaces keep the whole pipeline in one file under the original code's names. Adapters and diffusers' folders
speak of components and diffusers' names, so such a file is presented that way: by views, no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from regraft.adapter import MODEL
from regraft.checkpoints import Checkpoint, Reader
from regraft.checkpoints._encoders import find_encoders
from regraft.checkpoints._files import read_plain
from regraft.checkpoints._original import find_model
from regraft.tensor_files import TORCH_SUFFIXES
from regraft.tensors import TensorRef


def split_components(tensors: Mapping[str, TensorRef]) -> tuple[dict[str, Mapping[str, TensorRef]], tuple[str, ...]]:
    """Components by diffusers' names, of a file in the original names; one ``model`` where it is something else.

    Also the stored names that belong to no component: the autoencoder, tables of the noise schedule, …
    """
    model = find_model(tensors)
    if model is None:
        return {MODEL: tensors}, ()
    main = model.family.main
    encoders = find_encoders(tensors, {name: roots for name, roots in model.family.roots.items() if name != main})
    components = {main: model.tensors} | {name: encoder.tensors for name, encoder in encoders.items()}
    used = model.used.union(*(encoder.used for encoder in encoders.values()))
    return components, tuple(name for name in tensors if name not in used)


def _detect(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".safetensors", *TORCH_SUFFIXES)


def _read(path: Path) -> Checkpoint:
    plain, description = read_plain(path)
    components, left_out = split_components(plain.tensors)
    return Checkpoint(components, {}, description, plain.left_out + left_out)


READER = Reader("weights file", 20, _detect, _read)
