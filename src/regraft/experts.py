"""Bases with two denoisers of one shape (Wan 2.2): high noise and low noise, each of which takes the same adapter.

Nothing in an adapter's keys tells which expert it is for, so that each gets a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from regraft.adapter import MODEL, Adapter
from regraft.base import Base

#: Component of a diffusers pipeline → what Wan 2.2's makers call that expert.
EXPERTS: Mapping[str, str] = {"transformer": "high_noise", "transformer_2": "low_noise"}


def experts(adapter: Adapter, old: Base | None, new: Base) -> dict[str, Base]:
    """Expert → the new base with that one as its transformer; empty where one port is enough.

    Args:
        adapter: one of a single transformer.
        old: a base with one transformer, where it is known.
        new: any base.
    """
    changed = set(adapter.components())
    if not set(EXPERTS) <= set(new.components) or "transformer_2" in changed or not {"transformer", MODEL} & changed:
        return {}
    if old is not None and "transformer_2" in old.components:
        return {}
    rest = {name: tensors for name, tensors in new.components.items() if name not in EXPERTS}
    configs = {name: config for name, config in new.configs.items() if name not in EXPERTS}
    return {
        label: replace(
            new,
            components={"transformer": new.components[component], **rest},
            configs=configs | ({"transformer": new.configs[component]} if component in new.configs else {}),
        )
        for component, label in EXPERTS.items()
    }


def labelled(path: Path, label: str) -> Path:
    """The path with an expert's name in it: ``x.safetensors`` → ``x_high_noise.safetensors``."""
    return path.with_name(f"{path.stem}_{label}{path.suffix}")
