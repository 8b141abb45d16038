"""What goes wrong on a row's way to a worker and back is that row's own, and no result waits for what is not its."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from library import make_bases, make_library
from running import Run

from regraft.batch.done import Keys
from regraft.batch.local import LocalExecutor
from regraft.batch.options import RowOptions
from regraft.batch.pairs import PairSpec, fit_pair
from regraft.batch.rows import Row
from regraft.batch.work import failed
from regraft.errors import InputError
from regraft.report.batch_schema import BatchRow


def row(name: str) -> Row:
    return Row(f"/{name}", name, "old", "new", RowOptions())


class Heavy:
    """A pair for which there is no memory when it is sent the first time."""

    def __init__(self) -> None:
        self.tries = 0

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        self.tries += 1
        if self.tries == 1:
            raise MemoryError
        return str, ("the pair",)


def _told(row: Row, fitted: object, out: str | None, timeout: float | None) -> BatchRow:
    """In place of the work: what came with the row."""
    return failed(row, ValueError(f"came with {fitted}"))


class Posting(ThreadPoolExecutor):
    """A thread that gets what it is given as a process does: pickled, and of what can't be, the future is told."""

    def submit(self, function: Callable[..., Any], /, *given: Any, **more: Any) -> Future[Any]:
        try:
            sent = pickle.loads(pickle.dumps(given))
        except Exception as error:
            future: Future[Any] = Future()
            future.set_exception(error)
            return future
        return super().submit(function, *sent, **more)


def test_a_pair_that_can_not_be_sent_fails_its_row_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.batch.local._do", _told)
    monkeypatch.setattr("regraft.batch.local._pool", lambda: Posting(1))
    heavy: Any = Heavy()
    results = LocalExecutor(1).run([(row(name), heavy) for name in "abc"], None)
    told = {one.name: one.reason for _, one in results if isinstance(one, BatchRow)}
    assert "not enough memory" in told["a"]
    # Of one worker's rows the first brings the pair along.
    assert (told["b"], told["c"]) == ("ValueError: came with the pair", "ValueError: came with None")


def test_a_migration_that_can_not_be_hashed_is_told_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    make_bases(tmp_path)
    make_library(tmp_path / "loras", 1)
    given = ("--from", "old.safetensors", "--to", "new.safetensors", "-m", "lora-x", "--subspace-rank", 2)
    assert run("port", "loras/a0", *given, "--save-migration", "m.safetensors", "-o", "one").code == 0

    def broken(path: Path) -> str:
        raise InputError("can't be read (Input/output error)", file=path)

    monkeypatch.setattr("regraft.migrations.digest.file_hash", broken)
    spec = PairSpec("old.safetensors", "new.safetensors", RowOptions(migration="m.safetensors"))
    with pytest.raises(InputError, match="Input/output error"):
        fit_pair(spec, Keys())
