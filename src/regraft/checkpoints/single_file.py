"""One weights file: safetensors, or a PyTorch state dict."""

from __future__ import annotations

from pathlib import Path

from regraft.adapter import MODEL
from regraft.checkpoints import Checkpoint, Reader
from regraft.tensors import TORCH_SUFFIXES, read_tensor_file


def _detect(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".safetensors", *TORCH_SUFFIXES)


def _read(path: Path) -> Checkpoint:
    return Checkpoint({MODEL: read_tensor_file(path).tensors})


READER = Reader("weights file", 20, _detect, _read)
