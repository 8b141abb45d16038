"""The hash of a migration file, made beside the port that it is noted of."""

from __future__ import annotations

import hashlib
from pathlib import Path
from threading import Lock, Thread

from regraft.errors import reading


def file_hash(path: Path) -> str:
    """``sha256:`` + the SHA-256 of the file: the fingerprint of a migration.

    Raises:
        InputError: it can't be read.
    """
    with reading(path), path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


class FileDigest:
    """`file_hash` of a file, which is waited for where it is asked for.

    Begun before the maps are read, it goes through the file ahead of them: what they read lies in memory by then.
    """

    def __init__(self, path: Path, known: str | None = None) -> None:
        """Of ``path``, unless its hash is ``known``."""
        self._path = path
        self._found: str | Exception | None = known
        self._thread: Thread | None = None
        self._lock = Lock()

    def begin(self) -> None:
        """Begin, unless that has been done."""
        with self._lock:
            if self._found is None and self._thread is None:
                # No program waits for it at its end.
                self._thread = Thread(target=self._find, name="regraft-digest", daemon=True)
                self._thread.start()

    def result(self) -> str:
        """The hash.

        Raises:
            InputError: the file can't be read.
        """
        self.begin()
        if self._thread is not None:
            self._thread.join()
        if isinstance(self._found, Exception):
            raise self._found
        assert self._found is not None
        return self._found

    def _find(self) -> None:
        try:
            self._found = file_hash(self._path)
        except Exception as error:
            # Want of memory, too, is told to whoever asks for the hash.
            self._found = error

    def __reduce__(self) -> tuple[type[FileDigest], tuple[Path, str]]:
        # A worker elsewhere may not see the file.
        return FileDigest, (self._path, self.result())
