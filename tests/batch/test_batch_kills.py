"""A worker or the driver is killed in the middle: nothing is lost, and nothing is in the output twice or by half."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from library import contents, lines, make_bases, make_library

from regraft.batch.local import LocalExecutor, at_most
from regraft.batch.options import RowOptions
from regraft.batch.rows import Row
from regraft.batch.work import failed
from regraft.report.batch_schema import BatchRow

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="tells workers by their parent, the fork server"),
]
_COUNT = 24


def start(whole: Path, folder: Path) -> subprocess.Popen[bytes]:
    pair = ["--from", str(whole / "old.safetensors"), "--to", str(whole / "new.safetensors")]
    loras = str(whole / "loras")
    command = [sys.executable, "-m", "regraft", "batch", loras, *pair, "--out", "out", "--jobs", "2", "--quiet"]
    return subprocess.Popen(command, cwd=folder, start_new_session=True)


def wait_for_rows(place: Path, process: subprocess.Popen[bytes], rows: int) -> None:
    journal = place / "out" / "results.jsonl"
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < rows):
        time.sleep(0.01)
    assert process.poll() is None, "it was through before it could be killed"


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Children of the fork server, which is a child of the driver."""
    return [child for server in psutil.Process(process.pid).children() for child in server.children()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    make_bases(folder)
    make_library(folder / "loras", _COUNT)
    assert start(folder, folder).wait() == 0
    return folder


def test_workers_that_are_killed_lose_nothing(whole: Path, tmp_path: Path) -> None:
    process = start(whole, tmp_path)
    for rows in (1, 6):
        wait_for_rows(tmp_path, process, rows)
        workers(process)[0].kill()
    assert process.wait() == 0
    assert contents(tmp_path / "out") == contents(whole / "out")
    names = Counter(row["name"] for row in lines(tmp_path / "out"))
    assert len(names) == _COUNT + 1
    assert set(names.values()) == {1}
    assert not list((tmp_path / "out").rglob(".*.????????"))


def test_a_driver_that_is_killed_goes_on_where_it_was(whole: Path, tmp_path: Path) -> None:
    process = start(whole, tmp_path)
    wait_for_rows(tmp_path, process, 4)
    left = workers(process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(left, timeout=20)[1], "workers outlive their driver"
    before = lines(tmp_path / "out")
    assert start(whole, tmp_path).wait() == 0
    assert contents(tmp_path / "out") == contents(whole / "out")
    keys = Counter(row["key"] for row in lines(tmp_path / "out"))
    assert len(keys) == _COUNT + 1
    assert set(keys.values()) == {1}, "what was done was done again"
    assert {row["key"] for row in before} <= set(keys)


def _dies(row: Row, fitted: object, out: str | None, timeout: float | None) -> BatchRow:
    """In place of the work: one row always kills its worker."""
    if row.name == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return failed(row, ValueError("reached"))


def _hangs(row: Row, fitted: object, out: str | None, timeout: float | None) -> BatchRow:
    """Likewise: one row never ends."""
    with at_most(timeout):
        if row.name == "stuck":
            time.sleep(600)
        return failed(row, ValueError("reached"))


def test_a_row_that_never_ends_is_given_up_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.batch.local._do", _hangs)
    rows = [Row("/a", name, "old", "new", RowOptions()) for name in ("b", "stuck", "c", "d")]
    executor = LocalExecutor(2, retries=1, timeout=1.5)
    results = [result for _, result in executor.run([(row, None) for row in rows], None)]  # type: ignore[misc]
    told = {row.name: row for row in results if isinstance(row, BatchRow)}
    assert "longer than 1.5 s, 2 times" in told.pop("stuck").reason
    assert {row.reason for row in told.values()} == {"ValueError: reached"}


@pytest.mark.parametrize(
    ("inside", "code"), [("pass", 0), ("time.sleep(60)", 1), ("re.match('(a*)*$', 'a' * 40 + 'b')", 1)]
)
def test_what_is_in_time_is_left_alone_and_what_is_not_ends_whatever_it_does(inside: str, code: int) -> None:
    # A match holds Python's lock for hours.
    text = f"import re, time; from regraft.batch.local import at_most\nwith at_most(0.2): {inside}\ntime.sleep(0.5)"
    done = subprocess.run([sys.executable, "-c", text], check=False, capture_output=True, timeout=50)
    assert (done.returncode, done.stderr) == (code, b"")


def test_a_row_that_kills_each_worker_is_given_up_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.batch.local._do", _dies)
    rows = [Row("/a", name, "old", "new", RowOptions()) for name in ("b", "deadly", "c", "d")]
    results = [result for _, result in LocalExecutor(2, retries=1).run([(row, None) for row in rows], None)]  # type: ignore[misc]
    told = {row.name: row for row in results if isinstance(row, BatchRow)}
    assert "died 2 times" in told.pop("deadly").reason
    assert {row.reason for row in told.values()} == {"ValueError: reached"}
    assert all(row.attempts == 1 for row in told.values())
