"""Hashes of its own tensors that a trainer puts in a file's metadata: true again after the tensors changed.

Facts: sd-scripts serialises the tensors with the ``ss_*`` metadata; ``sshs_model_hash`` is the SHA-256 of the data
section, ``sshs_legacy_hash`` the first 8 digits of that of 64 KiB from offset 1 MiB. OneTrainer's
``modelspec.hash_sha256`` is ``0x`` + the SHA-256 of all tensors' bytes in the order of their names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from regraft.filehash import LEGACY_SPAN, legacy_digits

KEYS = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def with_true_hashes(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata, with those hashes that it has computed for these tensors."""
    result = dict(metadata)
    if "sshs_model_hash" in result or "sshs_legacy_hash" in result:
        raw = save(dict(tensors), {key: value for key, value in result.items() if key.startswith("ss_")})
        data = raw[8 + int.from_bytes(raw[:8], "little") :]
        start, size = LEGACY_SPAN
        hashes = {
            "sshs_model_hash": hashlib.sha256(data).hexdigest(),
            "sshs_legacy_hash": legacy_digits(raw[start : start + size]),
        }
        result |= {key: value for key, value in hashes.items() if key in result}
    if "modelspec.hash_sha256" in result:
        digest = hashlib.sha256()
        for _, tensor in sorted(tensors.items()):
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        result["modelspec.hash_sha256"] = f"0x{digest.hexdigest()}"
    return result
