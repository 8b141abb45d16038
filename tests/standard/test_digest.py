"""A migration file's hash, which is made while the port is at work."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import InputError
from regraft.migrations import digest
from regraft.migrations.digest import FileDigest, file_hash

CONTENT = b"maps" * 700_000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "m.safetensors").write_bytes(CONTENT)
    return tmp_path / "m.safetensors"


def test_it_is_that_of_the_whole_file(file: Path) -> None:
    assert FileDigest(file).result() == file_hash(file) == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


def test_a_file_is_read_once_and_only_when_it_is_wanted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def noting(path: Path) -> str:
        read.append(path)
        return file_hash(path)

    monkeypatch.setattr(digest, "file_hash", noting)
    wanted = FileDigest(file)
    assert read == []
    wanted.begin()
    wanted.begin()
    first = wanted.result()
    file.unlink()
    assert (wanted.result(), read) == (first, [file])


def test_a_worker_elsewhere_is_told_it(file: Path) -> None:
    there: Any = pickle.loads(pickle.dumps(FileDigest(file)))
    expected = file_hash(file)
    file.unlink()
    assert there.result() == expected


def test_a_file_that_is_gone_is_told_where_the_hash_is_asked_for(tmp_path: Path) -> None:
    gone = FileDigest(tmp_path / "gone.safetensors")
    gone.begin()
    for _ in range(2):
        with pytest.raises(InputError, match=r"gone\.safetensors"):
            gone.result()


def test_want_of_memory_is_told_there_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path) -> str:
        raise MemoryError("no room")

    monkeypatch.setattr(digest, "file_hash", failing)
    wanted = FileDigest(file)
    wanted.begin()
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            wanted.result()
