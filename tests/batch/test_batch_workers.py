"""What goes wrong on a row's way to a worker and back is that row's own, and no result waits for what is not its."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from library import make_bases, make_library
from running import Run

from regraft.batch import run_batch
from regraft.batch.done import Keys
from regraft.batch.local import LocalExecutor
from regraft.batch.on_ray import RayExecutor
from regraft.batch.options import RowOptions
from regraft.batch.pairs import Fitted, PairSpec, fit_pair
from regraft.batch.rows import Row
from regraft.batch.run import Executor
from regraft.batch.waiting import Job
from regraft.batch.work import failed
from regraft.errors import InputError
from regraft.report.batch_schema import BatchRow
from regraft.report.schema import BaseSummary


def row(name: str, target: str = "new") -> Row:
    return Row(f"/{name}", name, "old", target, RowOptions())


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


def on_threads(
    threads: ThreadPoolExecutor, work: Callable[[Row], BatchRow], monkeypatch: pytest.MonkeyPatch
) -> Executor:
    """The local executor whose two slots are threads."""

    class Slot:
        def submit(self, job: Job, *rest: object) -> Future[BatchRow]:
            return threads.submit(work, job[0])

        def close(self) -> None:
            pass

    monkeypatch.setattr("regraft.batch.local._Slot", Slot)
    return LocalExecutor(2)


class Rays:
    """As much of Ray as hands a row to a thread."""

    exceptions = SimpleNamespace(RayTaskError=ArithmeticError, RayError=LookupError)

    def __init__(self, threads: ThreadPoolExecutor, work: Callable[[Row], BatchRow]) -> None:
        self.threads, self.work = threads, work

    def remote(self, **options: object) -> Any:
        def task(row: Row, *rest: object) -> Future[BatchRow]:
            return self.threads.submit(self.work, row)

        return lambda function: SimpleNamespace(remote=task)

    def put(self, value: object) -> object:
        return value

    def wait(self, flying: list[Future[BatchRow]], num_returns: int, timeout: float | None = None) -> Any:
        ready = wait(flying, timeout, FIRST_COMPLETED).done
        return list(ready)[:num_returns], []

    def get(self, future: Future[BatchRow]) -> BatchRow:
        return future.result()

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1}


def on_rays(threads: ThreadPoolExecutor, work: Callable[[Row], BatchRow], monkeypatch: pytest.MonkeyPatch) -> Executor:
    return RayExecutor(Rays(threads, work))


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.parametrize("executor", [on_threads, on_rays])
def test_what_is_done_is_told_while_the_next_pair_is_fitted(
    executor: Any, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, both = Event(), Event()
    in_time: list[bool] = []
    base = BaseSummary(path="base", fingerprint="v1:0", family=None, structure="v1:0")

    def fit(spec: PairSpec, known: Keys, *, check: bool) -> Fitted:
        if spec.target == "newer":
            in_time.append(both.wait(5))
        return Fitted(spec, None, "", base, base)

    def work(row: Row) -> BatchRow:
        # The second one ends when its neighbour has been told, and nothing but the fit is left to begin.
        if row.name == "b":
            first.wait(5)
        return failed(row, ValueError("reached"))

    def tick(done: int, total: int, name: str) -> None:
        first.set()
        if done == 2:
            both.set()

    monkeypatch.setattr("regraft.batch.run.fit_pair", fit)
    rows = [row("a"), row("b"), row("c", "newer")]
    record = run_batch(rows, executor(threads, work, monkeypatch), out=None, check=True, tick=tick)
    assert in_time == [True]
    assert {one.name: one.reason for one in record.rows} == dict.fromkeys("abc", "ValueError: reached")
