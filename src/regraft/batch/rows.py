"""From what the user names to rows: which adapters, from which base to which, with what options, called what."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from regraft.batch.done import Done
from regraft.batch.manifest import at_row, is_manifest, read_manifest
from regraft.batch.options import RowOptions, parse_options
from regraft.batch.places import is_inside, is_url, location, path_of, persistently, store_of
from regraft.errors import InputError, RegraftError, UsageError
from regraft.hub import hub_id_of
from regraft.output import ADAPTER_CONFIG, names_file


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter to be carried.

    Attributes:
        adapter: absolute path, URL or hub id.
        name: in its library, with ``/``; never leads out of a folder.
        source: the old base: absolute path, or hub id.
        target: the new base, likewise.
        options: of this row.
        output: name of the output without its suffix, which the format decides.
        serve: it is for servers, see `regraft.batch.serving`.
        done: what an earlier run has put in its place, or has made of the same.
    """

    adapter: str
    name: str
    source: str
    target: str
    options: RowOptions = field(default_factory=RowOptions)
    output: str = ""
    serve: bool = False
    done: Done | None = None


@dataclass(frozen=True)
class _Found:
    adapter: str
    name: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    manifest: tuple[str, int] | None = None


def expand(
    sources: Iterable[str], source: str | None, target: str | None, options: RowOptions, *, without: str | None = None
) -> list[Row]:
    """All rows that the sources come to, in order, each once.

    Args:
        sources: folders, globs, manifests, files, hub ids and URLs.
        source: the old base, where a manifest names no other.
        target: the new base, likewise.
        options: that hold where a manifest sets no others.
        without: an output folder or URL: what lies in it is no input.

    Raises:
        InputError: a source is missing, or holds no adapter.
        UsageError: a base or option is missing or wrong.
    """
    rows: list[Row] = []
    skipped = location(without) if without is not None else None
    known: dict[str, RowOptions] = {}
    for text in sources:
        everything = list(_find(text))
        found = [one for one in everything if skipped is None or not is_inside(one.adapter, skipped)]
        if everything and not found:
            raise UsageError("the output folder holds the adapters themselves", file=without, remedy="Name another.")
        if not found:
            raise InputError("holds no adapter", file=text, remedy="Name a folder, a glob or a manifest of adapters.")
        rows += [_row(one, source, target, options, known) for one in found]
    return _named(list(dict.fromkeys(rows)))


def _row(
    found: _Found, source: str | None, target: str | None, options: RowOptions, known: dict[str, RowOptions]
) -> Row:
    columns = dict(found.columns)
    home = path_of(found.manifest[0]).parent if found.manifest and not is_url(found.manifest[0]) else None
    ends = [columns.pop(name, None) or given for name, given in (("from", source), ("to", target))]
    output = columns.pop("output", None) or None
    try:
        for name, end in zip(("from", "to"), ends, strict=True):
            if not end:
                raise UsageError(f"no base to go {name}", remedy=f"Give --{name}, or a column {name!r}.")
        if columns.get("migration"):
            columns["migration"] = _anywhere(str(columns["migration"]), home)
        key = json.dumps(columns, sort_keys=True, default=str)
        if key not in known:
            known[key] = parse_options(columns, options)
        if output is not None and not _stays_inside(str(output)):
            raise UsageError(f"output {str(output)!r} leads out of the output folder", remedy="Give a relative name.")
    except RegraftError as error:
        raise at_row(error, *found.manifest) if found.manifest else error from None
    bases = [_anywhere(str(end), home) for end in ends]
    return Row(found.adapter, found.name, bases[0], bases[1], known[key], str(output or ""))


def _anywhere(text: str, home: Path | None) -> str:
    """A base or a migration as any process finds it: an absolute path, or the hub id that it was given as."""
    if home is not None and os.path.lexists(home / path_of(text)):
        return str((home / path_of(text)).absolute())
    return text if is_url(text) or hub_id_of(text) is not None else str(path_of(text).absolute())


def _stays_inside(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return bool(name.strip("/. ")) and not name.startswith(("/", "\\")) and ".." not in parts and ":" not in parts[0]


def _named(rows: list[Row]) -> list[Row]:
    """The rows with their outputs' names, no one of which is another's or a folder that another lies in.

    Where two would be, both get some digits of what tells them apart.
    """
    stems = [stem_of(row.output or row.name) for row in rows]
    # Some disks don't tell capitals from small letters.
    plain = [stem.casefold() for stem in stems]
    counts = Counter(plain)
    folders = {name for row, name in zip(rows, plain, strict=True) if _may_be_folder(row)}
    nested = {name: around for name in counts if (around := _around(name) & folders)}
    taken = {name for name, count in counts.items() if count > 1}
    taken |= nested.keys() | {name for around in nested.values() for name in around}
    return [
        replace(row, output=f"{stem}.{_digits(row)}" if name in taken else stem)
        for row, stem, name in zip(rows, stems, plain, strict=True)
    ]


def _around(name: str) -> set[str]:
    """The names of all folders that it lies in."""
    parts = name.split("/")
    return {"/".join(parts[:depth]) for depth in range(1, len(parts))}


def _may_be_folder(row: Row) -> bool:
    """Whether its output may be a folder: a weights file stays one unless a format is asked for."""
    return row.options.format is not None or not names_file(Path(row.name))


def stem_of(name: str) -> str:
    """The name of an adapter without the suffix of a weights file."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if names_file(Path(name)) and path.stem else str(path)


def _digits(row: Row) -> str:
    told = [row.adapter, row.source, row.target, row.options.given(), row.output]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def _find(text: str) -> Iterator[_Found]:
    if is_manifest(text):
        yield from _in_manifest(text)
    elif is_url(text):
        yield from _in_store(text)
    elif os.path.lexists(path := path_of(text).absolute()):
        yield from (_Found(str(file), file.relative_to(path.parent).as_posix()) for file in [path] if _is_adapter(file))
        if path.is_dir() and not _is_adapter(path):
            yield from (_Found(str(file), file.relative_to(path).as_posix()) for file in _walk(path))
    elif hub_id_of(text) is not None:
        yield _Found(text, text.replace(":", "/").replace("@", "/"))
    elif glob.has_magic(text):
        root = Path(*_fixed(text)).absolute()
        hits = sorted(Path(hit).absolute() for hit in glob.glob(str(path_of(text)), recursive=True))
        adapters = [hit for hit in hits if _is_adapter(hit)]
        # A folder that is an adapter stands for its files.
        folders = {hit for hit in adapters if hit.is_dir()}
        yield from (_Found(str(f), f.relative_to(root).as_posix()) for f in adapters if f.parent not in folders)
    else:
        raise InputError("no such file or folder", file=text, remedy="Check the path.")


def _fixed(pattern: str) -> list[str]:
    """The parts of a glob before its first wildcard."""
    parts = path_of(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return list(parts[:first])


def _is_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() if path.is_dir() else path.is_file() and names_file(path)


def _walk(folder: Path) -> Iterator[Path]:
    """Adapters in a folder, in order: PEFT folders as one, other weights files each; nothing hidden."""
    for root, folders, files in os.walk(folder):
        here = Path(root)
        if here != folder and ADAPTER_CONFIG in files:
            folders.clear()
            yield here
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (here / name for name in sorted(files) if not name.startswith(".") and _is_adapter(here / name))


def _in_manifest(place: str) -> Iterator[_Found]:
    home = place.rpartition("/")[0] if is_url(place) else str(path_of(place).absolute().parent)
    for number, row in read_manifest(place):
        columns = {name: value for name, value in row.items() if name != "adapter"}
        adapter = str(row["adapter"])
        if not is_url(adapter):
            adapter = _beside(adapter, home)
        yield _Found(adapter, _name_of(adapter, home), columns, (place, number))


def _beside(adapter: str, home: str) -> str:
    """An adapter that a manifest names, which may be relative to it."""
    if is_url(home):
        return adapter if Path(adapter).is_absolute() else f"{home}/{adapter}"
    local = Path(home, path_of(adapter))
    if os.path.lexists(local) or hub_id_of(adapter) is None:
        # Not there: a row of its own that fails, and stops no other.
        return os.path.normpath(local)
    return adapter


def _name_of(adapter: str, home: str) -> str:
    if not is_url(adapter) and Path(adapter).is_absolute():
        return name_on_disk(Path(adapter), Path(os.path.normpath(home)))
    inside = adapter.removeprefix(f"{home}/")
    return inside if inside != adapter and _stays_inside(inside) else _last_of(adapter)


def name_on_disk(adapter: PurePath, home: PurePath) -> str:
    """An adapter's name below its manifest's folder, with ``/`` on every system; its own, where it lies elsewhere."""
    inside = adapter.relative_to(home).as_posix() if adapter.is_relative_to(home) else adapter.name
    return inside if _stays_inside(inside) else _last_of(inside)


def _last_of(name: str) -> str:
    """The last part of a name, whatever separates parts on some system."""
    last = re.split(r"[/\\:]", name.rstrip("/\\:"))[-1]
    return last if _stays_inside(last) else "adapter"


def _in_store(url: str) -> Iterator[_Found]:
    store, place = store_of(url)
    place = place.rstrip("/")
    scheme = url.partition("://")[0]
    magic = glob.has_magic(place)
    found = persistently(lambda: sorted(store.glob(place) if magic else store.find(place)), url, InputError)
    folders = {path.rpartition("/")[0] for path in found if path.endswith(f"/{ADAPTER_CONFIG}")}
    if magic:
        folders |= {path for path in found if store.exists(f"{path}/{ADAPTER_CONFIG}")}
    alone = found == [place]
    root = "/".join(place.split("/")[: _fixed_parts(place)]) if magic else place.rpartition("/")[0] if alone else place
    adapters = [path for path in found if names_file(Path(path)) and path.rpartition("/")[0] not in folders]
    for path in sorted({*adapters, *folders}):
        name = path.removeprefix(f"{root}/") if path != root else PurePosixPath(path).name
        if _stays_inside(name) and not any(part.startswith(".") for part in name.split("/")):
            yield _Found(f"{scheme}://{path}", name)


def _fixed_parts(pattern: str) -> int:
    parts = pattern.split("/")
    return next(i for i, part in enumerate(parts) if glob.has_magic(part))
