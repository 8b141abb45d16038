"""Models that read the same growing rows of tokens: what was read before is kept, and not read again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regraft.probes.text import longest, text_config
from regraft.runtime.libraries import library
from regraft.runtime.load import Loaded

# Slots of the cache that hold nothing any more are dropped once they are this many, beyond as many as are in use.
_SPARE = 64


@dataclass
class _Read:
    """What lies in the caches.

    Attributes:
        rows: tokens of each row.
        slots: row → where in the cache each of them is.
        width: slots in all.
        caches: one per model.
    """

    rows: list[list[int]] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    width: int = 0
    caches: list[Any] = field(default_factory=list)


class Passes:
    """Next-token logits of several models for the same rows.

    A row may be another's continuation (beams are reordered), lose its last tokens (a text split anew), and grow by
    more or fewer tokens than its neighbours: of the cache, slots that don't count are masked. So a step is one forward
    pass of each model, over the tokens that are new.
    """

    def __init__(self, models: Sequence[Loaded]) -> None:
        """Nothing is read yet.

        Args:
            models: of one architecture.
        """
        self.models = models
        self._accepts = set(inspect.signature(models[0].main.forward).parameters)
        self._caches = "past_key_values" in self._accepts
        self._slides = getattr(text_config(models[0]), "sliding_window", None) is not None
        self._read = _Read()

    def reset(self) -> None:
        """Forget what was read."""
        self._read = _Read()

    @torch.no_grad()
    def __call__(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits behind the last token of each row, (rows, vocabulary) of each model, float32.

        Args:
            rows: token ids, at least one each. Beyond what the models can read at most, the beginning is left out.
        """
        wanted = [self._cut(row) for row in rows]
        plan = self._plan(wanted)
        if plan is None:
            self.reset()
            plan = [(0, 0)] * len(wanted)
        before = self._read
        fed = [len(row) - count for row, (_, count) in zip(wanted, plan, strict=True)]
        width = before.width + max(fed)
        kept = [before.slots[source][:count] if count else [] for source, count in plan]
        slots = [[*old, *range(width - new, width)] for old, new in zip(kept, fed, strict=True)]
        inputs = _aligned(wanted, slots, fed, width)
        # Until all models have read, their caches agree with nothing: an interrupted pass leaves none behind.
        self.reset()
        caches = before.caches or [self._cache() for _ in self.models]
        sources = [source for source, _ in plan]
        if before.width and sources != list(range(len(before.rows))):
            for cache, model in zip(caches, self.models, strict=True):
                cache.reorder_cache(torch.tensor(sources, device=model.device))
        found = [self._run(model, cache, *inputs) for model, cache in zip(self.models, caches, strict=True)]
        self._read = _Read(wanted, slots, width, caches) if self._caches else _Read()
        return found

    def _cache(self) -> Any:
        return library("transformers").DynamicCache() if self._caches else None

    def _run(self, model: Loaded, cache: Any, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        settings = {
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": self._caches,
            "logits_to_keep": 1,
        }
        inputs = {
            name: value.to(model.device) if isinstance(value, Tensor) else value
            for name, value in settings.items()
            if name in self._accepts and value is not None
        }
        logits: Tensor = model.main(input_ids=ids.to(model.device), **inputs).logits
        return logits[:, -1].float()

    def _cut(self, row: Sequence[int]) -> list[int]:
        most = longest(self.models[0], len(row))
        # The beginning moves in jumps, so that the cache serves for the steps in between.
        jump = max(1, most // 4)
        return list(row[-(-(len(row) - most) // jump) * jump :])

    def _plan(self, wanted: list[list[int]]) -> list[tuple[int, int]] | None:
        """Per row, which one in the cache it goes on from, and how many of its tokens stay; None: begin anew."""
        read = self._read
        if not read.rows:
            return None
        plan = [self._source(i, row) for i, row in enumerate(wanted)]
        fed = [len(row) - count for row, (_, count) in zip(wanted, plan, strict=True)]
        longest_row = max(map(len, wanted))
        if 2 * max(fed) > max(2, longest_row) or read.width > 2 * longest_row + _SPARE:
            return None
        # A sliding window counts slots: none may lie idle between two that are in use.
        idle = len(set(fed)) > 1 or any(count < len(read.rows[source]) for source, count in plan)
        return None if self._slides and idle else plan

    def _source(self, i: int, row: list[int]) -> tuple[int, int]:
        rows = self._read.rows
        best, most = 0, -1
        for j in sorted(range(len(rows)), key=lambda j: j != i):
            shared = _common(row, rows[j])
            if shared > most:
                best, most = j, shared
            if shared >= len(row) - 1:
                break
        # The last token is always read: its logits are asked for.
        return best, min(most, len(row) - 1)


def _aligned(
    rows: list[list[int]], slots: list[list[int]], fed: list[int], width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions of the tokens to read, (rows, most of them) and padded on the left; the mask (rows, width)."""
    ids, positions = torch.zeros(2, len(rows), max(fed), dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (row, new) in enumerate(zip(rows, fed, strict=True)):
        ids[i, -new:] = torch.tensor(row[-new:])
        positions[i, -new:] = torch.arange(len(row) - new, len(row))
        mask[i, slots[i]] = 1
    return ids, mask, positions


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two rows begin with alike."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
