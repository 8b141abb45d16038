"""Where a batch writes: a folder that is its own, held by one driver at a time, or a URL, which nothing holds."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path

from regraft.batch.journal import STEMS
from regraft.batch.places import home_of, is_inside, is_url, location, path_of, persistently, store_of
from regraft.batch.rows import Row
from regraft.errors import OutputError, UsageError, first_line
from regraft.experts import EXPERTS, labelled
from regraft.output import STAGED
from regraft.tensor_files import WEIGHTS_SUFFIXES

#: What a batch holds while it writes to a folder.
LOCK = ".regraft-batch.lock"


def check_out(rows: Sequence[Row], out: str, *, overwrite: bool) -> None:
    """Whether outputs can go there without touching what is not of a batch; a folder is made.

    Raises:
        UsageError: the adapters themselves lie there.
        OutputError: it is a file, holds other things (which ``overwrite`` allows), or can't be made or looked into.
    """
    place = location(out)
    if any(is_inside(home, place) for home in {home_of(row.adapter) for row in rows}):
        raise UsageError("the output folder holds the adapters themselves", file=out, remedy="Name another one.")
    if is_url(out):
        is_file, is_free = persistently(lambda: _in_store(out), out, OutputError)
    else:
        folder = path_of(out)
        try:
            is_file = folder.exists() and not folder.is_dir()
            is_free = is_file or not folder.exists() or has_journal(folder) or _is_empty(folder)
        except OSError as error:
            raise OutputError(f"can't be looked into ({error.strerror})", file=out) from None
    if is_file:
        raise OutputError("is a file, and the output is a folder", file=out, remedy="Choose another name.")
    if not (overwrite or is_free):
        what = "holds other things than an earlier batch"
        raise OutputError(what, file=out, remedy="Choose another folder, or pass --overwrite.")
    if is_url(out):
        return
    try:
        path_of(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"can't be made ({error.strerror})", file=out) from None


def has_journal(folder: Path) -> bool:
    """Whether an output folder is one of earlier runs."""
    return any((folder / f"{stem}.jsonl").is_file() for stem in STEMS)


def _is_empty(folder: Path) -> bool:
    return all(file.name == LOCK for file in folder.iterdir())


def _in_store(url: str) -> tuple[bool, bool]:
    """Whether a URL is a file, and whether it is free for a batch: nothing lies there, or an earlier one does."""
    store, place = store_of(url)
    store.invalidate_cache()
    if store.isfile(place):
        return True, False
    # A driver that was killed leaves parts of a journal.
    if any(store.exists(f"{place}/{name}") for stem in STEMS for name in (f"{stem}.jsonl", f".{stem}")):
        return False, True
    try:
        held = store.ls(place, detail=False)
    except FileNotFoundError:
        held = []
    # Some stores list an empty object that stands for the folder.
    return False, all(name.strip("/") == place.strip("/") for name in held)


@contextmanager
def alone_in(out: str) -> Iterator[None]:
    """No other batch writes to the same folder; a driver that was killed holds nothing.

    Stores have no locks: that one batch at a time writes to a URL is left to the user.

    Raises:
        OutputError: another one does, or the folder can't be locked.
    """
    if is_url(out):
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(path_of(out) / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError("another batch is writing here", file=out, remedy="Wait for it, or stop it.") from None
    except (OSError, NotImplementedError) as error:
        raise OutputError(f"can't be locked ({first_line(error)})", file=out) from None
    try:
        yield
    finally:
        lock.release()


def sweep(rows: Sequence[Row], out: str) -> None:
    """Remove what workers that were killed left half-written beside their outputs."""
    if is_url(out):
        return
    begun: dict[Path, set[str]] = {}
    for row in rows:
        place = path_of(out) / row.output
        begun.setdefault(place.parent, set()).add(place.name)
    for folder, stems in begun.items():
        for left in folder.glob(".*") if folder.is_dir() else []:
            if _is_stage(left, stems):
                shutil.rmtree(left, ignore_errors=True)


def _is_stage(folder: Path, stems: AbstractSet[str]) -> bool:
    """Whether `regraft.output.whole` has made a folder for one of these outputs: by its name, and by what it holds."""
    found = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", folder.name)
    if found is None or not folder.is_dir():
        return False
    name = found[1]
    near = (stem for stem in stems if name.startswith(stem.partition(".")[0][:STAGED]))
    if not any(name == output[:STAGED] for stem in near for output in _outputs(stem)):
        return False
    try:
        return all(held.name[:STAGED] == name or held.name == "replaced" for held in folder.iterdir())
    except OSError:
        return False


def _outputs(stem: str) -> Iterator[str]:
    """What an output may be called: a folder or a file, for the whole base or one expert of it."""
    for suffix in ("", *WEIGHTS_SUFFIXES):
        name = Path(stem + suffix)
        yield name.name
        yield from (labelled(name, label).name for label in EXPERTS.values())
