"""Two adapters are the same where their updates are, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import toys
from regraft.adapter import Adapter
from regraft.content import content_of
from regraft.tensors import InMemory
from regraft.updates import LowRank


def changed(adapter: Adapter, **parts: object) -> Adapter:
    """The adapter with its last update changed."""
    *_, last = adapter.updates
    update = adapter.updates[last]
    assert isinstance(update, LowRank)
    return replace(adapter, updates={**adapter.updates, last: replace(update, **parts)})  # type: ignore[arg-type]


def test_what_a_file_says_beside_the_updates_does_not_count() -> None:
    adapter = toys.lora(toys.llama())
    assert content_of(adapter) == content_of(replace(adapter, metadata={"note": "another"}, path=Path("elsewhere")))


def test_every_part_of_an_update_counts() -> None:
    adapter = toys.lora(toys.llama())
    one = next(iter(adapter.updates.values()))
    assert isinstance(one, LowRank)
    others = [
        changed(adapter, scale=3.0),
        changed(adapter, up=InMemory(one.up.load() + 1e-6)),
        changed(adapter, bias=InMemory(torch.zeros(3))),
        replace(adapter, updates=dict(list(adapter.updates.items())[1:])),
    ]
    assert len({content_of(adapter), *map(content_of, others)}) == 5
