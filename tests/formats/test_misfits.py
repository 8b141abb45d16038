"""Tensors of one module that don't belong together are named when the file is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from regraft import InputError, load_adapter

STEM = "lora_unet_down_blocks_0_attentions_0_proj_in"
# Suffixes with shapes, the key that is named, and what is said of it.
CASES: dict[str, tuple[dict[str, tuple[int, ...]], str, str]] = {
    "a core of another rank": (
        {"hada_w1_a": (3, 32), "hada_w1_b": (3, 32), "hada_w2_a": (3, 32), "hada_w2_b": (3, 32)}
        | {"hada_t1": (3, 3, 3, 3), "hada_t2": (2, 2, 3, 3)},
        "hada_w2_a",
        "has 3 where t2 (the rank) has 2",
    ),
    "a lokr core of another rank": (
        {"lokr_w1": (2, 2), "lokr_w2_a": (2, 16), "lokr_w2_b": (2, 16), "lokr_t2": (3, 3, 3, 3)},
        "lokr_w2_a",
        "has 2 where t2 (the rank) has 3",
    ),
    "a butterfly that can't pair its blocks": (
        {"oft_blocks": (4, 4, 8, 8)},
        "oft_blocks",
        "4 blocks of 8, which 4 butterfly stages can't pair",
    ),
    "a factor for fewer rows": (
        {"oft_blocks": (4, 8, 8), "rescale": (31, 1)},
        "rescale",
        "has 31 where the weight (its rows) has 32",
    ),
    "a magnitude for fewer rows": (
        {"lora_up.weight": (32, 4), "lora_down.weight": (4, 32), "dora_scale": (31, 1)},
        "dora_scale",
        "has 31 where the weight (its rows) has 32",
    ),
    "glora for other inputs": (
        {"a1.weight": (30, 2), "a2.weight": (2, 30), "b1.weight": (32, 2), "b2.weight": (2, 32)},
        "b2.weight",
        "has 32 where a1 (the inputs) has 30",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_key_and_the_reason_are_named(name: str, tmp_path: Path) -> None:
    shapes, key, why = CASES[name]
    path = tmp_path / "a.safetensors"
    save_file({f"{STEM}.{suffix}": torch.zeros(shape) for suffix, shape in shapes.items()}, path)
    with pytest.raises(InputError) as raised:
        load_adapter(path)
    assert f"{STEM}.{key}" in str(raised.value)
    assert why in str(raised.value)
