"""What is done, line by line while it happens: the results table grows from it, and a later run goes on from it."""

from __future__ import annotations

import json
import re
import time
from typing import Any

from pydantic import ValidationError

from regraft.batch.done import Done, Keys
from regraft.batch.lean import lean
from regraft.batch.places import is_url, path_of, persistently, store_of, write_text_to
from regraft.errors import InputError, OutputError, reading
from regraft.report.batch_schema import BatchRow

# A store has no appending: lines are put there in parts, with a row that comes after so many, or so long.
_LINES, _SECONDS = 200, 10.0
_KEY = re.compile("[0-9a-f]{32}")
#: Of a journal: what a port, and what a forecast is noted in.
STEMS = ("results", "forecast")


class Journal:
    """``results.jsonl`` (of a forecast, ``forecast.jsonl``) of an output folder or URL.

    A line that a kill has cut off is passed over; its row is done again.
    """

    def __init__(self, out: str, stem: str) -> None:
        """Open it, and read what an earlier run left.

        Raises:
            OutputError: it can't be written.
            InputError: it can't be read.
        """
        self.place = f"{out}/{stem}.jsonl"
        self._parts = f"{out}/.{stem}"
        self._lines: list[str] = []
        self._since = time.monotonic()
        self._rows: dict[str, BatchRow] = {}
        self._placed: dict[str, BatchRow] = {}
        for text in self._read().values():
            self._take(text)
        if is_url(out):
            # From the first moment on the place is known for a batch's.
            write_text_to("", f"{self._parts}/0.jsonl")
        else:
            file = path_of(self.place)
            try:
                cut = file.is_file() and file.read_bytes()[-1:] not in (b"", b"\n")
                self._file = file.open("a", encoding="utf-8")
                if cut:
                    self._file.write("\n")
            except OSError as error:
                raise OutputError(f"can't be written ({error.strerror})", file=file) from None

    def _read(self) -> dict[str, str]:
        """The texts of its files by their names, in order."""
        if not is_url(self.place):
            file = path_of(self.place)
            with reading(file):
                return {self.place: file.read_text(encoding="utf-8", errors="replace")} if file.is_file() else {}
        store, place = store_of(self.place)
        _, parts = store_of(self._parts)

        def texts() -> dict[str, str]:
            store.invalidate_cache()
            files = [place] if store.exists(place) else []
            files += sorted(store.find(parts)) if store.exists(parts) else []
            return {file: store.cat_file(file).decode("utf-8", errors="replace") for file in files}

        return persistently(texts, self.place, InputError)

    def _take(self, text: str) -> None:
        for line in text.split("\n"):
            try:
                row = lean(BatchRow.model_validate(json.loads(line)))
            except (ValueError, ValidationError):
                continue
            if row.key is not None and _KEY.fullmatch(row.key) and row.status != "failed":
                # A later line knows better where the output is.
                self._rows[row.key] = self._placed[row.output] = row

    def keys(self) -> Keys:
        """Of all that is done. What failed is tried again."""
        return Keys(self._rows)

    def row(self, key: str, output: str) -> BatchRow:
        """What is noted of a key that is done: of equal adapters, what was put in this place."""
        placed = self._placed.get(output)
        return placed if placed is not None and placed.key == key else self._rows[key]

    def placed(self, output: str) -> Done | None:
        """What was put in a place."""
        row = self._placed.get(output)
        return None if row is None else _done(row)

    def made(self, key: str) -> Done:
        """What was made of a key, wherever it lies."""
        row = self._rows.get(key)
        return Done(key, lost=True) if row is None else _done(row)

    def note(self, row: BatchRow) -> None:
        """Add a row, unless it says what an earlier one says; on a disk it is there at once, in a store after `put`.

        Raises:
            OutputError: it can't be written.
        """
        earlier = self._placed.get(row.output)
        if row.reused and earlier is not None and _told(earlier) == _told(row):
            return
        # By json, which can write half of a surrogate pair, as the name of a file that is no UTF-8 has it.
        line = json.dumps(row.model_dump(by_alias=True))
        if not is_url(self.place):
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                raise OutputError(f"can't be written ({error.strerror})", file=path_of(self.place)) from None
            return
        self._lines.append(line)
        if len(self._lines) >= _LINES or time.monotonic() - self._since > _SECONDS:
            self.put()

    def put(self) -> None:
        """Bring to a store what was noted since the last time.

        Raises:
            OutputError: the store does not take it.
        """
        if self._lines:
            write_text_to("\n".join(self._lines) + "\n", f"{self._parts}/{time.time_ns()}.jsonl")
        self._lines, self._since = [], time.monotonic()

    def close(self) -> None:
        """Leave it whole, as one file."""
        if not is_url(self.place):
            self._file.close()
            return
        self.put()
        texts = self._read()
        lines: dict[str, None] = {}
        for text in texts.values():
            for line in filter(None, text.split("\n")):
                # A driver that was killed below has left parts of what is in the whole. Of equal lines the last counts.
                lines.pop(line, None)
                lines[line] = None
        read = set(texts)
        del texts
        if lines:
            write_text_to("\n".join(lines) + "\n", self.place)
        self._remove(read)

    def _remove(self, read: set[str]) -> None:
        """Remove the parts that were read: nothing holds a store, and another driver's may have come since."""
        store, parts = store_of(self._parts)

        def remove() -> None:
            store.invalidate_cache()
            if not store.exists(parts):
                return
            there = set(store.find(parts))
            if there <= read:
                # In one request: on the hub, each is a commit.
                store.rm(parts, recursive=True)
                return
            for part in there & read:
                store.rm_file(part)

        persistently(remove, self._parts, OutputError)


def _told(row: BatchRow) -> tuple[object, ...]:
    return row.key, row.name, row.outputs


def _done(row: BatchRow) -> Done:
    assert row.key is not None
    return Done(row.key, row.output, tuple(row.outputs), tuple(row.output_hashes))


def reused(earlier: BatchRow, now: BatchRow, outputs: tuple[str, ...], seconds: float = 0.0) -> BatchRow:
    """An earlier row under the names that it has now."""
    names: dict[str, Any] = {
        name: getattr(now, name) for name in ("adapter", "name", "source", "target", "options", "output")
    }
    return earlier.model_copy(update={**names, "outputs": list(outputs), "seconds": seconds, "reused": True})
