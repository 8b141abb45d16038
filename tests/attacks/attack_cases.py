"""The registry of hostile and broken files: a name, how the file is made, and what the user is told."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VERBS = ("inspect", "check", "port", "convert")
#: Makes the file in a folder; answers with the name of what is to be opened.
Build = Callable[[Path], str]


@dataclass(frozen=True)
class Case:
    """One kind of broken or hostile file.

    Attributes:
        name: unique; what is wrong with it.
        build: makes it.
        says: a pattern of the line that the user sees.
        verbs: the verbs that must fail with that line.
        fine: the verbs that must work on it without a word on stderr.
        code: of the exit.
        role: what it is: an adapter, a base (as ``--to``) or a migration.
    """

    name: str
    build: Build
    says: str
    verbs: tuple[str, ...] = VERBS
    fine: tuple[str, ...] = ()
    code: int = 1
    role: str = "adapter"


CASES: dict[str, Case] = {}


def attack(name: str, build: Build, says: str = "", **options: Any) -> None:
    """Register one case."""
    assert name not in CASES, name
    CASES[name] = Case(name, build, says, **options)


# --- what the cases are made of ---------------------------------------------------------------------------------------

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = f"lora_unet_{MODULE.replace('.', '_')}"
UP, DOWN, ALPHA = f"{FLAT}.lora_up.weight", f"{FLAT}.lora_down.weight", f"{FLAT}.alpha"
PEFT_UP, PEFT_DOWN = f"base_model.model.{MODULE}.lora_B.weight", f"base_model.model.{MODULE}.lora_A.weight"
NAME = "lora.safetensors"


def numbers(*shape: int) -> Tensor:
    return (
        torch.linspace(-1, 1, max(1, torch.Size(shape).numel())).reshape(shape)
        if 0 not in shape
        else torch.zeros(shape)
    )


def good() -> dict[str, Tensor]:
    """A LoRA of sd-scripts on one module of the base."""
    return {DOWN: numbers(2, 8), UP: numbers(8, 2), ALPHA: torch.tensor(2.0)}


def raw(header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> Build:
    """A safetensors file byte by byte."""

    def build(place: Path) -> str:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (place / NAME).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return NAME

    return build


def entry(**changes: Any) -> Build:
    """A file of one tensor of 8 bytes, with some fields of its entry changed; None leaves one out."""
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return raw({UP: {name: value for name, value in fields.items() if value is not None}}, bytes(8))


def content(data: bytes, name: str = NAME) -> Build:
    """A file of these bytes."""

    def build(place: Path) -> str:
        (place / name).write_bytes(data)
        return name

    return build


def saved(tensors: Mapping[str, Tensor | None], metadata: Mapping[str, str] | None = None, **add: Tensor) -> Build:
    """The good LoRA with tensors put in, changed, or taken out (None)."""

    def build(place: Path) -> str:
        both: dict[str, Tensor | None] = {**good(), **tensors, **add}
        kept = {name: tensor.contiguous() for name, tensor in both.items() if tensor is not None}
        save_file(kept, place / NAME, metadata=dict(metadata) if metadata else None)
        return NAME

    return build


def only(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Build:
    """A file of these tensors alone."""

    def build(place: Path) -> str:
        save_file(dict(tensors), place / NAME, metadata=dict(metadata) if metadata else None)
        return NAME

    return build


GOOD_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"]}


def folder(config: bytes | str | Mapping[str, Any], **more: bytes) -> Build:
    """A PEFT folder with this config."""

    def build(place: Path) -> str:
        (place / "lora").mkdir()
        save_file({PEFT_UP: numbers(8, 2), PEFT_DOWN: numbers(2, 8)}, place / "lora" / "adapter_model.safetensors")
        text = json.dumps({**GOOD_CONFIG, **config}) if isinstance(config, Mapping) else config
        data = text.encode() if isinstance(text, str) else text
        (place / "lora" / "adapter_config.json").write_bytes(data)
        for name, there in more.items():
            (place / "lora" / name).write_bytes(there)
        return "lora"

    return build
