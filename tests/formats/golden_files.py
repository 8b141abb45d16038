"""Files made to the golden key lists: the same keys, dtypes and metadata, and shapes cut to keep them small."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def golden(name: str) -> dict[str, Any]:
    """A golden list by its name without suffix."""
    for file in (GOLDEN / f"{name}.json", GOLDEN / f"{name}.json.gz"):
        if file.is_file():
            raw = file.read_bytes()
            return json.loads(gzip.decompress(raw) if file.suffix == ".gz" else raw)
    raise FileNotFoundError(name)


def _cut(size: int) -> int:
    # Widths of transformers keep their proportions, so that fused weights still divide into their parts.
    return size // 128 if size % 1024 == 0 else min(size, 32)


def build(name: str, folder: Path, *, whole_shapes: bool = False) -> Path:
    """The golden list as a file (a folder where it has a config), its values all different; returns its path.

    Dimensions are cut, all alike so that factors keep matching, unless ``whole_shapes``.
    """
    data = golden(name)
    tensors = {}
    for number, (key, about) in enumerate(data["tensors"].items()):
        shape = about["shape"] if whole_shapes else [_cut(size) for size in about["shape"]]
        value = torch.full(shape, number % 97 + 1, dtype=DTYPES[about["dtype"]])
        if key.endswith(".alpha"):
            value = torch.full(shape, 4, dtype=DTYPES[about["dtype"]])
        tensors[key] = value
    metadata = {key: str(value) for key, value in data["metadata"].items()}
    if "adapter_config" not in data:
        path = folder / f"{name}.safetensors"
        save_file(tensors, path, metadata=metadata)
        return path
    path = folder / name
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata=metadata)
    config = data["adapter_config"]
    if not whole_shapes:
        # Ranks above the cut are cut in the tensors too.
        config = {**config, "r": min(config["r"], 32)}
        config["rank_pattern"] = {k: min(v, 32) for k, v in (config.get("rank_pattern") or {}).items()}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
