"""Files written whole or not at all: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file

from regraft.errors import OutputError, first_line
from regraft.tensors import TORCH_SUFFIXES

if TYPE_CHECKING:
    from regraft.formats import Written


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Fail before the work is done, not after it.

    Raises:
        OutputError: ``path`` exists and ``overwrite`` is off, or its folder is missing or read-only.
    """
    if path.exists() and not overwrite:
        raise OutputError("exists already", file=path, remedy="Choose another name, or pass --overwrite.")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError("the output folder does not exist", file=parent, remedy="Make it first.")
    if not os.access(parent, os.W_OK):
        raise OutputError("no permission to write here", file=parent)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place on success and vanishes on any failure.

    Raises:
        OutputError: the disk is full or the file can't be written.
    """
    path = path.absolute()
    try:
        # A private folder: it can hold a file or a folder alike, and nobody else's name collides with it.
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _said(error, path) from None
    try:
        yield stage / path.name
        _replace(stage / path.name, path, stage)
    except (OSError, SafetensorError) as error:
        raise _said(error, path) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace(new: Path, path: Path, stage: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # A folder can't be replaced in one step: set the old one aside, and back if the new one can't take its place.
        aside = stage / "replaced"
        os.replace(path, aside)
        try:
            os.replace(new, path)
        except OSError:
            os.replace(aside, path)
            raise
    else:
        os.replace(new, path)


def _said(error: Exception, path: Path) -> OutputError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        return OutputError("the disk is full", file=path, remedy="Free some space; nothing was written.")
    return OutputError(f"can't be written ({first_line(error)})", file=path)


def write_whole(content: Written, path: Path, *, overwrite: bool) -> list[Path]:
    """Put a format's output on disk; returns the files written.

    Raises:
        OutputError: see `check_writable` and `whole`.
    """
    check_writable(path, overwrite=overwrite)
    folder = content.folder or bool(content.files)
    if folder and path.suffix in (".safetensors", ".bin"):
        raise OutputError(
            "this format is a folder (config beside weights)",
            file=path,
            remedy="Name a folder without a suffix.",
        )
    if not folder and path.suffix.lower() in TORCH_SUFFIXES:
        raise OutputError("the output is a safetensors file", file=path, remedy="Give it the suffix .safetensors.")
    with whole(path) as stage:
        if not folder:
            save_file(dict(content.tensors), stage, metadata=dict(content.metadata))
        else:
            stage.mkdir()
            save_file(dict(content.tensors), stage / content.weights_name, metadata=dict(content.metadata))
            for name, source in content.files.items():
                if isinstance(source, Path):
                    shutil.copyfile(source, stage / name)
                else:
                    (stage / name).write_text(source, encoding="utf-8")
        _readable(stage)
    if not folder:
        return [path]
    return [path / content.weights_name, *(path / name for name in content.files)]


def write_text(text: str, path: Path, *, overwrite: bool) -> Path:
    """Write a report or record whole.

    Raises:
        OutputError: see `check_writable` and `whole`.
    """
    check_writable(path, overwrite=overwrite)
    with whole(path) as stage:
        stage.write_text(text, encoding="utf-8")
        _readable(stage)
    return path


def _readable(path: Path) -> None:
    # mkdtemp's privacy must not outlive the move: others may read what the umask lets them.
    mask = os.umask(0)
    os.umask(mask)
    with suppress(OSError):
        for file in [path, *(path.rglob("*") if path.is_dir() else [])]:
            file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
