"""Whether there is anything to learn from what a model made with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.errors import InputError
from regraft.probes.batches import Batch, TextBatch
from regraft.probes.batches_diffusion import DiffusionBatch


def useless(path: Path | None, what: str) -> InputError:
    """The error for an old base that ``what`` with the adapter of this file."""
    return InputError(
        f"the old base with this adapter {what}: nothing can be learnt from it",
        file=path,
        remedy="Is it the base that it was trained on? If it only answers certain beginnings, give them by --prompts.",
    )


def check_useful(batches: Sequence[Batch], path: Path | None) -> None:
    """Look at what the old base made with the adapter.

    Raises:
        InputError: the texts are all the same, or states are no numbers.
    """
    own = [batch for batch in batches if batch.made_by == "adapter"]
    texts = [text for batch in own if isinstance(batch, TextBatch) for text in batch.ids["old"].tolist()]
    # Behind the first token, which may be drawn at random.
    if len(texts) > 1 and len({tuple(text[1:]) for text in texts}) == 1:
        raise useless(path, "writes the same text every time")
    if any(not bool(batch.latents[1].isfinite().all()) for batch in own if isinstance(batch, DiffusionBatch)):
        raise useless(path, "draws pictures that are no numbers (NaN)")
