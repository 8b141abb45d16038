"""Manifests: tables with a row for each adapter, as csv, jsonl or parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from regraft.batch.options import RANKS, whole_number
from regraft.batch.places import is_url, path_of, persistently, store_of
from regraft.errors import InputError, RegraftError, UsageError, first_line, reading

SUFFIXES = (".csv", ".jsonl", ".parquet")


def is_manifest(place: str) -> bool:
    """Whether a path or URL names a table."""
    return place.lower().endswith(SUFFIXES)


def read_manifest(place: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a table with their numbers, from 1; columns that begin with ``_`` are left out.

    Raises:
        InputError: it can't be read, or has no column ``adapter``.
        UsageError: parquet, without pyarrow.
    """
    raw = _bytes_of(place)
    readers = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}
    kind = place.lower().rpartition(".")[2]
    rows = readers[kind](raw, place)
    for name in RANKS:
        _read_ranks(rows, name)
    for number, row in enumerate(rows, start=1):
        if not row.get("adapter"):
            raise InputError(
                f"row {number} names no adapter",
                file=place,
                remedy="A manifest has a column `adapter`; `from`, `to`, `output` and options are columns, too.",
            )
        yield number, {name: value for name, value in row.items() if not name.startswith("_")}


def _read_ranks(rows: list[dict[str, Any]], name: str) -> None:
    """Make whole numbers of a column of ranks, in which 1.0 is a rank of 1; among shares it is one of them."""
    found = [(row, whole_number(row.get(name))) for row in rows]
    if any(whole is None and _is_share(row.get(name)) for row, whole in found):
        return
    for row, whole in found:
        if whole is not None:
            row[name] = whole


def _is_share(value: Any) -> bool:
    try:
        return 0 < float(value) < 1
    except (TypeError, ValueError):
        return False


def _bytes_of(place: str) -> bytes:
    if not is_url(place):
        with reading(place):
            return path_of(place).read_bytes()
    store, path = store_of(place)
    found: bytes = persistently(lambda: store.cat_file(path), place, InputError)
    return found


def _text_of(raw: bytes, place: str) -> str:
    with reading(place):
        return raw.decode("utf-8-sig")


def _csv(raw: bytes, place: str) -> list[dict[str, Any]]:
    try:
        rows = list(csv.DictReader(io.StringIO(_text_of(raw, place), newline=""), strict=True))
    except csv.Error as error:
        raise InputError(f"is no csv ({error})", file=place) from None
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise InputError(
                f"row {number} has more cells than the head", file=place, remedy="Quote cells with commas."
            )
    return rows


def _jsonl(raw: bytes, place: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_text_of(raw, place).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"line {number} is no JSON ({first_line(error)})", file=place) from None
        if not isinstance(row, dict):
            raise InputError(f"line {number} is no JSON object", file=place)
        rows.append(row)
    return rows


def _parquet(raw: bytes, place: str) -> list[dict[str, Any]]:
    try:
        from pyarrow import BufferReader, lib, parquet
    except ImportError:
        raise UsageError(
            "parquet needs pyarrow", file=place, remedy="pip install 'regraft[batch]', or give csv."
        ) from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(BufferReader(raw)).to_pylist()
        return rows
    except (lib.ArrowException, OSError) as error:
        raise InputError(f"is no parquet ({first_line(error)})", file=place) from None


def at_row(error: RegraftError, place: str, number: int) -> RegraftError:
    """The same error, with the row that it was found in."""
    return type(error)(error.what, file=place, key=f"row {number}", remedy=error.remedy)
