"""Bases and adapters by their ids on the Hugging Face hub, read in part or downloaded into the hub's own cache.

An id is ``org/name``, ``org/name@revision``, ``org/name@revision:file``, ``org/name:folder`` or
``org/name:folder/file``. A path that exists always wins over it.

Everything that needs huggingface_hub is in the other modules, so that a local file is opened without it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from regraft.tensor_files import WEIGHTS_SUFFIXES
from regraft.tensors import TensorRef

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^@:\s]+))?(?::(?P<file>[^:]+))?", re.ASCII
)
_LOCAL_SUFFIXES = (*WEIGHTS_SUFFIXES, ".json")


@dataclass(frozen=True)
class HubId:
    """A place on the hub.

    Attributes:
        repo: ``org/name``.
        revision: branch, tag or commit; None for the main branch.
        file: file or folder in the repository; None for all of it.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.file}" if self.file else "")


def hub_id_of(given: str | Path) -> HubId | None:
    """The hub id that ``given`` is, or None where it is a path: it exists, or looks like a file's.

    >>> str(hub_id_of("org/name@v1:unet/model.safetensors"))
    'org/name@v1:unet/model.safetensors'
    >>> hub_id_of("loras/mine.safetensors") is None
    True
    """
    text = given.as_posix() if isinstance(given, Path) else given
    match = _ID.fullmatch(text)
    if match is None or ".." in re.split(r"[/:@]", text) or os.path.lexists(Path(given).expanduser()):
        return None
    if match["file"] is None and match["revision"] is None and text.lower().endswith(_LOCAL_SUFFIXES):
        return None
    file = match["file"].strip("/") if match["file"] else None
    return HubId(match["repo"], match["revision"], file or None)


def names_repository(text: str) -> bool:
    """Whether ``text`` is ``org/name``, whatever lies on the disk by that name."""
    match = _ID.fullmatch(text)
    return match is not None and match["revision"] is None and match["file"] is None and ".." not in text


def runnable(path: Path) -> Path:
    """The path itself, or where a model on the hub was downloaded to with all that it needs to run."""
    hub_id = hub_id_of(path)
    if hub_id is None:
        return path
    from regraft.hub.repository import download_runnable

    return download_runnable(hub_id)


def fetch_ahead(refs: Iterable[TensorRef]) -> None:
    """Fetch those of these tensors that lie on the hub, all at once, so that loading them one by one is quick."""
    # Where that module was not loaded, no tensor can lie on the hub.
    if "regraft.hub.remote" in sys.modules:
        from regraft.hub.remote import fetch_whole

        fetch_whole(refs)
