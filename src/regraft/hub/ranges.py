"""A file on a server, read in part by HTTP range requests.

Nearby ranges are fetched as one, several at a time. A connection that is cut is taken up where it broke off; a server
that is busy is asked again after the time that it names.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, by its docs
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from regraft.errors import InputError
from regraft.hub.access import BUSY, HTTP_ERROR, LONGEST_WAIT, explained, pause, retry_after

_TRIES, _MOST_TRIES, _TIMEOUT = 5, 100, 30.0
# Ranges nearer than this are cheaper to fetch with what lies between; no request for several is longer than the other.
_GAP, _LONGEST_REQUEST = 1 << 17, 1 << 24
_AT_ONCE = 16
# A server that ignores ranges sends the file from its start: up to here, the rest is read over.
_READ_OVER = 1 << 24
_REDIRECTS = 5

Span = tuple[int, int]


class _Again(Exception):
    """This try failed in a way that the next may not."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class _Pieces:
    """Parts of a file by where they start."""

    def __init__(self, parts: Iterable[tuple[int, bytes]]) -> None:
        self.parts: Mapping[int, bytes] = dict(parts)
        self._starts = sorted(self.parts)

    def find(self, span: Span) -> bytes | None:
        """The bytes of the span, or None where they are not in one piece."""
        start, size = span
        if not size:
            return b""
        at = bisect_right(self._starts, start) - 1
        if at < 0:
            return None
        first = self._starts[at]
        part = self.parts[first][start - first : start - first + size]
        return part if len(part) == size else None


@dataclass(eq=False)
class RemoteFile:
    """A file at a URL that never changes (a commit's).

    Attributes:
        url: of the hub; it may lead on to another server.
        name: for messages: ``org/name@revision:file``.
        size: in bytes.
    """

    url: str
    name: str
    size: int
    _direct: str | None = field(default=None, repr=False)
    _held: _Pieces = field(default_factory=lambda: _Pieces(()), repr=False)

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of every (start, size).

        Raises:
            InputError: the server refuses, or does not answer.
        """
        fetched = _Pieces(self._fetch_all(_joined([span for span in spans if self._held.find(span) is None])))

        def bytes_of(span: Span) -> bytes:
            held = self._held.find(span)
            found = fetched.find(span) if held is None else held
            assert found is not None
            return found

        return [bytes_of(span) for span in spans]

    def hold(self, spans: Iterable[Span]) -> None:
        """Fetch these and keep them for later reads."""
        missing = _joined([span for span in spans if self._held.find(span) is None])
        self._held = _Pieces([*self._held.parts.items(), *self._fetch_all(missing)])

    def _fetch_all(self, spans: Sequence[Span]) -> Iterator[tuple[int, bytes]]:
        if len(spans) < 2:
            yield from ((start, self._fetch(start, size)) for start, size in spans)
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from zip([start for start, _ in spans], pool.map(lambda span: self._fetch(*span), spans), strict=True)

    def _fetch(self, start: int, size: int) -> bytes:
        if start + size > self.size:
            raise InputError("ends before the bytes that its header speaks of", file=self.name)
        got, idle = bytearray(), 0
        for _ in range(_MOST_TRIES):
            before = len(got)
            trouble = self._try(start + before, start + size, got)
            if len(got) >= size:
                return bytes(got)
            # Whatever came through is progress; only tries in a row without any count.
            idle = idle + 1 if len(got) == before else 0
            if idle >= _TRIES or (trouble.after or 0) > LONGEST_WAIT:
                break
            pause(idle, trouble.after)
        raise self._gave_up(trouble)

    def _try(self, start: int, stop: int, into: bytearray) -> _Again:
        """One try; what went wrong, if anything did."""
        try:
            self._stream(start, stop, into)
        except _Again as again:
            return again
        except OfflineModeIsEnabled as error:
            raise explained(error, self.name) from None
        return _Again("the hub sent less than it was asked for")

    def _gave_up(self, again: _Again) -> InputError:
        wait = f"in {again.after:.0f} s" if again.after else "later"
        return InputError(str(again), file=self.name, remedy=f"Try again {wait}, or download the file.")

    def _stream(self, start: int, stop: int, into: bytearray) -> None:
        """Append bytes start … stop to ``into``, as many as come."""
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        url, direct = self._direct or self.url, self._direct is not None
        try:
            for _ in range(_REDIRECTS):
                sent = {**headers, **(_own_headers() if _same_server(url, self.url) else {})}
                with get_session().stream("GET", url, headers=sent, follow_redirects=False, timeout=_TIMEOUT) as answer:
                    if answer.status_code // 100 == 3 and "Location" in answer.headers:
                        url = self._direct = urljoin(url, answer.headers["Location"])
                        continue
                    if direct and answer.status_code in (401, 403, 404, 410):
                        # Such links are signed for a while: ask the hub for a new one.
                        self._direct = None
                        raise _Again("the link to the file has expired")
                    self._take(answer, start, stop, into)
                    return
        except HTTP_ERROR:
            raise _Again("the connection to the hub broke") from None
        raise InputError("is redirected without end", file=self.name)

    def _take(self, answer: Any, start: int, stop: int, into: bytearray) -> None:
        status = answer.status_code
        if status in BUSY:
            self._direct = None
            what = "the hub says: too many requests" if status == 429 else f"the hub answers with error {status}"
            raise _Again(what, retry_after(answer.headers))
        if status == 200:
            self._read_over(answer, start, stop, into)
            return
        if status != 206:
            try:
                answer.read()
                hf_raise_for_status(answer)
            except HfHubHTTPError as error:
                raise explained(error, self.name) from None
            raise InputError(f"the hub answers with status {status}", file=self.name)
        told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
        if told is None or int(told[1]) != start or (told[3] != "*" and int(told[3]) != self.size):
            self._direct = None
            raise _Again("the server sent other bytes than it was asked for")
        for block in answer.iter_bytes():
            into += block[: stop - start]
            start += len(block)
            if start >= stop:
                return

    def _read_over(self, answer: Any, start: int, stop: int, into: bytearray) -> None:
        """The whole file comes: skip what lies before."""
        if stop > _READ_OVER:
            raise InputError(
                "the server sends whole files only", file=self.name, remedy="Download it and give its path."
            )
        at = 0
        for block in answer.iter_bytes():
            into += block[max(0, start - at) : max(0, stop - at)]
            at += len(block)
            if at >= stop:
                return


def _own_headers() -> dict[str, str]:
    return dict(build_hf_headers(library_name="regraft"))


def _same_server(one: str, other: str) -> bool:
    """Whether a token meant for ``other`` may be sent to ``one``."""
    return urlsplit(one)[:2] == urlsplit(other)[:2]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Few spans that cover all given ones."""
    joined: list[Span] = []
    for start, size in sorted(set(spans)):
        first, length = joined[-1] if joined else (start, 0)
        end = max(first + length, start + size)
        if end == first + length and joined:
            continue
        if joined and start - (first + length) <= _GAP and end - first <= _LONGEST_REQUEST:
            joined[-1] = (first, end - first)
        else:
            joined.append((start, size))
    return joined
