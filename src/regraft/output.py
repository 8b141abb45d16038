"""Files written whole or not at all: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file

from regraft.errors import OutputError, first_line
from regraft.tensor_files import TORCH_SUFFIXES, WEIGHTS_SUFFIXES
from regraft.tensors import all_finite

if TYPE_CHECKING:
    from regraft.formats import Written

#: What tells that a folder is an adapter's.
ADAPTER_CONFIG = "adapter_config.json"
#: So many characters of an output's name are in that of the folder that `whole` makes for it.
STAGED = 40
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def check_writable(path: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Fail before the work is done, not after it.

    Args:
        path: what is to be written, a file or a folder.
        overwrite: whether it may be there already.
        source: the adapter's own path, where it is known: its parents are never replaced.

    Raises:
        OutputError: ``path`` exists and ``overwrite`` is off, or is a folder that is more than an adapter; or its
            parent folder is missing or read-only.
    """
    try:
        folder = path.is_dir()
    except OSError as error:
        raise _said(error, path) from None
    if folder:
        _check_replaceable(path, overwrite=overwrite, source=source)
    elif os.path.lexists(path):
        if not overwrite:
            raise OutputError("exists already", file=path, remedy="Choose another name, or pass --overwrite.")
        if path.exists() and not path.is_file():
            raise OutputError("is no regular file", file=path, remedy="Choose another name.")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError("the output folder does not exist", file=parent, remedy="Make it first.")
    if not os.access(parent, os.W_OK):
        raise OutputError("no permission to write here", file=parent)


def _check_replaceable(folder: Path, *, overwrite: bool, source: Path | None) -> None:
    """An adapter's folder or an empty one may be replaced when told to; no other folder is regraft's to touch."""
    true = folder.resolve()
    if Path.cwd().is_relative_to(true):
        what = "is the current folder, or one above it"
        raise OutputError(what, file=folder, remedy="Name a folder inside of it.")
    if source is not None and true in source.resolve().parents:
        raise OutputError(f"holds the input {source.name}", file=folder, remedy="Choose another name.")
    if not overwrite:
        raise OutputError("exists already", file=folder, remedy="Choose another name, or pass --overwrite.")
    if not (folder / ADAPTER_CONFIG).is_file() and any(folder.iterdir()):
        raise OutputError(
            f"is a folder of other things (no {ADAPTER_CONFIG} in it), which --overwrite does not replace",
            file=folder,
            remedy="Choose another name.",
        )


def names_file(path: Path) -> bool:
    """Whether a path that is not there yet is a weights file's: a folder's name may have dots, as in ``llama-3.1``."""
    return path.suffix.lower() in WEIGHTS_SUFFIXES


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place on success and vanishes on any failure.

    A folder takes the place of a folder with whatever else was in the old one; a file never that of a folder.

    Raises:
        OutputError: the disk is full or the file can't be written.
    """
    path = path.absolute()
    if path.is_symlink() and path.is_dir():
        # The folder itself is replaced, and the link goes on pointing to it.
        path = path.resolve()
    try:
        # A private folder: it can hold a file or a folder alike, and nobody else's name collides with it.
        # A name of the longest length that a disk allows has no room for more beside it.
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name[:STAGED]}.", dir=path.parent))
    except OSError as error:
        raise _said(error, path) from None
    try:
        yield stage / path.name
        _replace(stage / path.name, path, stage)
    except (OSError, SafetensorError) as error:
        raise _said(error, path) from None
    finally:
        with undisturbed():
            shutil.rmtree(stage, ignore_errors=True)


def _replace(new: Path, path: Path, stage: Path) -> None:
    if not path.is_dir():
        if path.exists() and new.is_dir():
            raise OutputError("is a file, and the output is a folder", file=path, remedy="Choose another name.")
        os.replace(new, path)
        return
    if not new.is_dir():
        raise OutputError("is a folder, and the output is a file", file=path, remedy=f"Name a file inside of {path}.")
    for old in path.iterdir():
        if not os.path.lexists(new / old.name):
            _keep(old, new / old.name)
    if _exchange(new, path):
        # The old folder now lies in the stage, and goes with it.
        return
    with undisturbed():
        # Elsewhere it takes two steps: set the old one aside, and back if the new one can't take its place.
        aside = stage / "replaced"
        os.replace(path, aside)
        try:
            os.replace(new, path)
        except OSError:
            os.replace(aside, path)
            raise


def _exchange(one: Path, two: Path) -> bool:
    """Give two paths each other's names in one step, so that not even a kill leaves a name empty; False if it can't.

    Linux has ``renameat2(RENAME_EXCHANGE)`` and macOS ``renamex_np(RENAME_SWAP)``, but not on every disk.
    """
    paths = os.fsencode(one), os.fsencode(two)
    at_cwd, swap = -100, 2
    try:
        system = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return bool(system.renamex_np(*paths, swap) == 0)
        return bool(system.renameat2(at_cwd, paths[0], at_cwd, paths[1], swap) == 0)
    except (OSError, TypeError, AttributeError):
        return False


def _keep(old: Path, new: Path) -> None:
    """The same file or tree under a second name; its bytes are shared where the disk can."""
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=_link)
    else:
        _link(old, new)


def _link(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(old, new, follow_symlinks=False)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is through, so that no half of it is left standing."""
    if threading.current_thread() is not threading.main_thread():
        # Python hands signals to the main thread alone.
        yield
        return
    came: list[int] = []
    # A handler that Python didn't install reads as None, and couldn't be put back.
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) is not None}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _said(error: Exception, path: Path) -> OutputError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        return OutputError("the disk is full", file=path, remedy="Free some space; nothing was written.")
    return OutputError(f"can't be written ({first_line(error)})", file=path)


def write_whole(content: Written, path: Path, *, overwrite: bool, source: Path | None = None) -> list[Path]:
    """Put a format's output on disk; returns the files written.

    Raises:
        OutputError: see `check_writable` and `whole`.
    """
    check_writable(path, overwrite=overwrite, source=source)
    if not content.tensors and not content.beside:
        what = "nothing is left to write: no key of the input was understood"
        raise OutputError(what, file=source or path, remedy="`regraft inspect` lists its keys.")
    folder = content.in_folder
    if folder and names_file(path):
        raise OutputError(
            "this format is a folder (config beside weights)",
            file=path,
            remedy="Name a folder without a suffix.",
        )
    other = path.suffix.lower() in (*TORCH_SUFFIXES, ".gguf") or content.suffix != ".safetensors"
    if not folder and other and path.suffix.lower() != content.suffix:
        what = f"the output is a {content.suffix.removeprefix('.')} file"
        raise OutputError(what, file=path, remedy=f"Give it the suffix {content.suffix}.")
    _check_finite(content, path)
    with whole(path) as stage:
        if not folder:
            _save(content, stage)
        else:
            stage.mkdir()
            _save(content, stage / content.weights_name)
            for name, tensors in content.beside.items():
                save_file(dict(tensors), stage / name)
            for name, file in content.files.items():
                if isinstance(file, Path):
                    shutil.copyfile(file, stage / name)
                else:
                    (stage / name).write_text(file, encoding="utf-8", newline="")
        readable(stage)
    if not folder:
        return [path]
    return [path / content.weights_name, *(path / name for name in (*content.beside, *content.files))]


def _check_finite(content: Written, path: Path) -> None:
    for key, tensor in content.tensors.items():
        if not all_finite(tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            remedy = "Choose a lower strength, or a wider --save-dtype."
            raise OutputError(f"would hold NaN or Inf in {dtype}", file=path, key=key, remedy=remedy)


def _save(content: Written, path: Path) -> None:
    if content.save is not None:
        content.save(path)
        return
    save_file(dict(content.tensors), path, metadata=dict(content.metadata))
    sort_metadata(path)


def sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors header in the order of its keys.

    The library hashes it with a new seed in every process; the same content must give the same bytes.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        # Written as the library's own writer does, so that it has the same length; spaces fill up to a multiple of 8.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise OSError("the header changed its length")
        file.seek(8)
        file.write(text)


def in_utf8(text: str) -> str:
    """The text with a mark for what a file's name may hold and no page can: it need not be UTF-8 on a disk."""
    return text.encode("utf-8", "replace").decode()


def write_text(text: str, path: Path, *, overwrite: bool) -> Path:
    """Write a report or record whole.

    Raises:
        OutputError: see `check_writable` and `whole`.
    """
    check_writable(path, overwrite=overwrite)
    with whole(path) as stage:
        stage.write_text(text, encoding="utf-8")
        readable(stage)
    return path


def readable(path: Path) -> None:
    """Give a staged file or folder the permissions that the umask lets new files have."""
    # mkdtemp's privacy must not outlive the move: others may read what the umask lets them.
    mask = os.umask(0)
    os.umask(mask)
    with suppress(OSError):
        for file in [path, *(path.rglob("*") if path.is_dir() else [])]:
            file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
