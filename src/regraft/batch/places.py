"""Where adapters come from and go to: a disk, or any store that fsspec knows."""

from __future__ import annotations

import hashlib
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from regraft.errors import InputError, OutputError, RegraftError, first_line
from regraft.hub import hub_id_of
from regraft.migrations.digest import file_hash
from regraft.output import ADAPTER_CONFIG, readable, whole

T = TypeVar("T")
#: See `location`.
Location = tuple[object, tuple[str, ...]]

# Stores that show an object once all of it is there; on others a file grows under its name.
_WHOLE_PUTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "memory"}
# Protocol → the package that fsspec has it from.
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "hf": "huggingface_hub",
}
# Before a repository's name in hf://; without one, as with `models`, it is a model's.
_HUB_KINDS = ("datasets", "spaces", "kernels", "buckets")
_TRIES, _PAUSE = 3, 0.5


def is_url(text: str) -> bool:
    """Whether a place is a URL of a store; ``file://`` counts as a path."""
    return re.match(r"[a-z][a-z0-9+.-]+://", text) is not None and not text.startswith("file://")


def path_of(text: str) -> Path:
    """The path that is no `is_url`."""
    return Path(unquote(urlsplit(text).path)) if text.startswith("file://") else Path(text).expanduser()


def without_slash(place: str) -> str:
    """A folder's URL with no slash at its end: stores take ``a//b`` and ``a/b`` for two."""
    if not is_url(place):
        return place
    scheme, _, path = place.partition("://")
    return f"{scheme}://{path.rstrip('/')}"


def store_of(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the place in it.

    Raises:
        RegraftError: the package for such URLs is not installed.
    """
    try:
        import fsspec
    except ImportError:
        raise RegraftError("URLs need fsspec", file=url, remedy="pip install 'regraft[batch]'") from None
    protocol = url.partition("://")[0]
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        return found
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        what = f"need {package}" if package else f"need another package ({first_line(error)})"
        raise RegraftError(
            f"URLs of {protocol}:// {what}", file=url, remedy=f"pip install {package}" if package else None
        ) from None
    except ValueError as error:
        raise InputError(f"is no URL that can be read ({first_line(error)})", file=url) from None


def location(place: str) -> Location:
    """What two places are compared by: the kind of store, None for the disk, and the parts of the path in it."""
    if not is_url(place):
        return None, path_of(place).resolve().parts
    # By its text alone: a library may have a million URLs. Where `..` is no step up, nothing has such a name.
    scheme, _, path = place.partition("://")
    parts = tuple(part for part in posixpath.normpath(f"/{path}").split("/") if part)
    return _kind(scheme), _with_revision(parts) if scheme == "hf" else parts


def _with_revision(parts: tuple[str, ...]) -> tuple[str, ...]:
    """A place on the hub, with the branch that is meant where none is named; another branch is another place."""
    if parts[:1] == ("models",):
        parts = parts[1:]
    repository = 2 if parts and parts[0] in _HUB_KINDS else 1
    if len(parts) <= repository:
        return parts
    name, _, revision = parts[repository].partition("@")
    rest = parts[repository + 1 :]
    if revision == "refs":
        # As in `@refs/pr/1`; other slashes of a revision are written %2F.
        revision, rest = "/".join(("refs", *rest[:2])), rest[2:]
    return (*parts[:repository], f"{name}@{unquote(revision) or 'main'}", *rest)


@lru_cache
def _kind(scheme: str) -> object:
    """One for all schemes of a store: s3a is s3."""
    try:
        import fsspec

        found: object = fsspec.get_filesystem_class(scheme)
        return found
    except (ImportError, ValueError):
        # It can't be read here, which whoever reads it is told.
        return scheme


def is_inside(place: str, folder: Location) -> bool:
    """Whether a path or URL is that folder, or lies in it at any depth; a hub id lies in none."""
    if hub_id_of(place) is not None:
        return False
    store, parts = location(place)
    return store == folder[0] and parts[: len(folder[1])] == folder[1]


def home_of(place: str) -> str:
    """The folder that a path or URL lies in; a hub id itself."""
    if hub_id_of(place) is not None:
        return place
    return place.rstrip("/").rpartition("/")[0] if is_url(place) else str(path_of(place).parent)


def persistently(action: Callable[[], T], file: str, error_class: type[RegraftError]) -> T:
    """Do what a store may refuse for a moment; three tries.

    Raises:
        RegraftError: of ``error_class``, where it never worked.
    """
    for left in reversed(range(_TRIES)):
        try:
            return action()
        except FileNotFoundError:
            # The hub says the same of what a token may not see.
            token = " What is private needs a token: HF_TOKEN." if file.startswith("hf://") else ""
            raise error_class("no such file", file=file, remedy=f"Check the URL.{token}") from None
        except RegraftError:
            # No word of the store's: a package that it lacks is not there at the third try either.
            raise
        except Exception as error:
            # Each store has errors of its own, and no common class.
            if not left:
                raise error_class(f"the store does not answer ({first_line(error)})", file=file) from None
            time.sleep(_PAUSE)
    raise AssertionError("unreachable")


def fetch(url: str, folder: Path) -> Path:
    """Bring a file or a PEFT folder from a store into ``folder``.

    Raises:
        InputError: it is not there.
        RegraftError: no such store can be read here.
    """
    store, place = store_of(url)
    target = folder / PurePosixPath(place).name

    def get() -> Path:
        # A slash at the end copies what is in the folder, not the folder.
        if store.isdir(place):
            target.mkdir(exist_ok=True)
            store.get(place.rstrip("/") + "/", str(target) + "/", recursive=True)
        else:
            store.get_file(place, str(target))
        return target

    return persistently(get, url, InputError)


def put(file: Path, url: str) -> None:
    """Put a file or an adapter's folder into a store, each object whole or not at all.

    Of a folder, the config comes last: without it, nothing takes the folder for an adapter.

    Raises:
        OutputError: the store does not take it.
    """
    store, place = store_of(url)
    if file.is_dir():
        parts = sorted(file.iterdir(), key=lambda part: (part.name == ADAPTER_CONFIG, part.name))
        for part in parts:
            _put_file(store, part, f"{place}/{part.name}", f"{url}/{part.name}")
    else:
        _put_file(store, file, place, url)


def _put_file(store: Any, file: Path, place: str, url: str) -> None:
    protocols = {store.protocol} if isinstance(store.protocol, str) else set(store.protocol)
    if protocols & _WHOLE_PUTS:
        persistently(lambda: store.put_file(str(file), place), url, OutputError)
        return
    part = f"{place}.{uuid.uuid4().hex}.part"

    def upload() -> None:
        store.makedirs(part.rpartition("/")[0], exist_ok=True)
        store.put_file(str(file), part)
        store.mv(part, place)

    try:
        persistently(upload, url, OutputError)
    except BaseException:
        # What is there of it, where anything is, is no use to anybody.
        with suppress(Exception):
            store.rm_file(part)
        raise


def place(file: Path, target: str) -> None:
    """Put a copy of a file or an adapter's folder in its place, on disk or in a store, whole or not at all.

    Raises:
        OutputError: it can't be written.
    """
    if is_url(target):
        put(file, target)
        return
    path = path_of(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as stage:
        if file.is_dir():
            shutil.copytree(file, stage)
        else:
            shutil.copyfile(file, stage)
        readable(stage)


def digest(path: Path) -> tuple[str, int]:
    """Hash of an adapter's bytes, whatever it is called, and how many there are.

    Raises:
        InputError: it can't be read.
    """
    if not path.is_dir():
        return file_hash(path), path.stat().st_size
    found, size = hashlib.sha256(), 0
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        found.update(f"{file.name}\t{file_hash(file)}\n".encode())
        size += file.stat().st_size
    return f"sha256:{found.hexdigest()}", size


def write_text_to(text: str, target: str) -> None:
    """Write a table or page whole, on disk or into a store.

    Raises:
        OutputError: it can't be written.
    """
    write_bytes_to(text.encode("utf-8", "replace"), target)


def write_bytes_to(content: bytes, target: str) -> None:
    """The same for bytes."""
    with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
        file = Path(folder) / PurePosixPath(target).name
        file.write_bytes(content)
        place(file, target)
