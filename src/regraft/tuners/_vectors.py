"""Singular vectors of weights, kept in a folder where one is named."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft.singular import Singular, decompose
from regraft.tensors import raw


def vectors_of(weight: Tensor, rank: int | None, folder: str | Path | None) -> Singular:
    """`decompose`, from a file where the folder has one for these very values.

    Args:
        weight: (out, in, …), floating-point numbers.
        rank: as `decompose` takes it.
        folder: None computes anew.
    """
    if folder is None:
        return decompose(weight, rank)
    plain = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)} {rank}".encode())
    digest.update(raw(plain))
    path = Path(folder) / f"{digest.hexdigest()[:40]}.safetensors"
    try:
        held = load_file(path)
        return Singular(held["u"], held["s"], held["v"])
    except (OSError, SafetensorError, KeyError):
        # None yet, or a damaged one.
        pass
    found = decompose(weight, rank)
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    save_file({part: getattr(found, part).float().cpu().contiguous() for part in Singular._fields}, name)
    os.replace(name, path)
    return Singular(*(tensor.float() for tensor in found))
