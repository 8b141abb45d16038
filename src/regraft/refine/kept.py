"""What models made for a refine, kept on disk: a second run of other training settings, or a resumed one, reads it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from regraft._version import __version__
from regraft.adapter import Adapter
from regraft.base import Base
from regraft.content import content_of
from regraft.errors import OutputError, first_line
from regraft.filehash import file_hashes
from regraft.output import whole
from regraft.probes.batches import Batch, Batches, TextBatch
from regraft.probes.batches_diffusion import DiffusionBatch
from regraft.refine.drawn import PictureBatch
from regraft.refine.pictures import PreparedBatch
from regraft.refine.settings import RefineSettings
from regraft.runtime.training_state import kept_file

# Of the settings, those that inputs depend on; of the retention, whether there is any.
_ASKED = (
    "n_inputs", "prompts", "filter", "seed", "config", "teacher", "bridge_strength", "guidance", "joining"
)  # fmt: skip
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (TextBatch, DiffusionBatch, PreparedBatch, PictureBatch)
}


def inputs_file(adapter: Adapter | str, old: Base, new: Base, settings: RefineSettings, sampled: bool) -> Path:
    """The file for inputs that these make of each other: by content, not by name.

    Args:
        adapter: as it was trained on ``old``; prompts may come from its metadata. Of one that is no change of weights,
            its digest.
        old: the old base.
        new: the new base.
        settings: how inputs are made.
        sampled: they are samples to learn from, not states to compare outputs on.
    """
    made_with: object = adapter
    if isinstance(adapter, Adapter):
        made_with = [content_of(adapter), dict(adapter.metadata), sorted(map(str, adapter.sidecars))]
    content = {
        "version": __version__,
        "adapter": made_with,
        "old": str(old.prints),
        "new": str(new.prints),
        "settings": {name: getattr(settings, name) for name in _ASKED},
        "mapper": None if settings.mapper is None else file_hashes(settings.mapper).sha256,
        "kept": settings.kept > 0,
        "sampled": sampled,
    }
    return kept_file("refine", content, "inputs-")


def read_or_made(file: Path, make: Callable[[], Batches]) -> tuple[Batches, str]:
    """Inputs from a file, or made and kept there; and why they could not be kept, if so.

    A damaged file counts as none. A disk that is full costs the second run its time, and this one nothing.
    """
    with suppress(OSError, KeyError, ValueError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError):
        return _read(file), ""
    made = make()
    try:
        content = {"fit": [_plain(b) for b in made.fit], "held_out": [_plain(b) for b in made.held_out]}
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as stage:
            torch.save({**content, "made": made.made}, stage)
    except (OSError, OutputError, RuntimeError, KeyError) as error:
        return made, first_line(error)
    return made, ""


def _plain(batch: Batch) -> dict[str, Any]:
    """A batch's class and fields; `torch.load` reads nothing but tensors and plain values."""
    kind = type(batch).__name__
    _KINDS[kind]
    return {"kind": kind, **{f.name: getattr(batch, f.name) for f in fields(_KINDS[kind]) if f.name != "known"}}


def _read(file: Path) -> Batches:
    found = torch.load(file, weights_only=True)
    parts = [
        tuple(_KINDS[batch.pop("kind")](**batch) for batch in map(dict, found[part])) for part in ("fit", "held_out")
    ]
    if not parts[0] or not parts[1]:
        raise ValueError("no inputs")
    return Batches(parts[0], parts[1], str(found["made"]))
