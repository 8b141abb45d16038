"""The state of a training on disk: by content, not by name, so that one that was stopped can go on."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from regraft.cache import cache_folder
from regraft.errors import InputError, OutputError, first_line
from regraft.output import whole


def kept_file(room: str, content: Mapping[str, Any], kind: str = "") -> Path:
    """The cache's file of what depends on this content alone, in the folder ``room`` of the cache."""
    text = json.dumps(content, sort_keys=True, default=str)
    return cache_folder() / room / f"{kind}{hashlib.sha256(text.encode()).hexdigest()[:24]}.pt"


def keep(content: Mapping[str, Any], file: Path) -> str:
    """Write a state; returns why not, or nothing: a full disk costs the chance to go on, not the training."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as stage:
            torch.save(dict(content), stage)
    except (OSError, OutputError, RuntimeError) as error:
        return first_line(error)
    return ""


@contextmanager
def taken_up(file: Path) -> Iterator[dict[str, Any]]:
    """What `keep` wrote, to go on from inside of the block.

    Raises:
        InputError: it is damaged, or does not fit what the block puts it into.
    """
    try:
        yield torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"the state of the earlier run can't be read ({first_line(error)})",
            file=file,
            remedy="Run without --resume.",
        ) from error
