"""Ray and an object store, both the real ones: what comes out is what this machine's processes write to a disk."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
from library import batch, contents, lines, make_bases, make_library
from running import Run

from regraft.batch.on_ray import RayExecutor
from regraft.batch.options import RowOptions
from regraft.batch.rows import Row
from regraft.batch.work import failed
from regraft.report.batch_schema import BatchRow
from regraft.report.json_schema import parse
from regraft.report.serving_schema import ServingReport

pytestmark = pytest.mark.slow


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_bases(tmp_path)
    make_library(tmp_path / "loras")
    return tmp_path


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """moto's server, spoken to by the protocol of S3."""
    server_class = pytest.importorskip("moto.server").ThreadedMotoServer
    s3fs = pytest.importorskip("s3fs")
    server = server_class(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    # Its buckets are the process's, and outlive the server of the test before.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield files
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_ray_writes_the_same_bytes(here: Path, run: Run) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        (here / "loras" / "bad.safetensors").write_bytes(b"x" * 100)
        pair = ("--from", "old.safetensors", "--to", "new.safetensors")
        ran = run("batch", "loras", *pair, "--out", "by-ray", "--ray", "auto")
        assert ran.code == 1
        assert "4 were carried over, 1 failed" in ran.out
        assert "Ray, 2 processors" in ran.out
        # Under another name it is known by what it is.
        (here / "loras" / "a0").rename(here / "loras" / "b0")
        again = run("batch", "loras", *pair, "--out", "by-ray", "--ray", "auto")
        assert "4 of them had been done before" in again.out
    finally:
        ray.shutdown()
    batch(["loras"], here / "here")
    made = contents(here / "by-ray")
    assert {name: made.get(name) for name in contents(here / "here")} == contents(here / "here")


def test_workers_of_ray_that_are_killed_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    make_bases(tmp_path)
    make_library(tmp_path / "loras", 40)
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        journal = tmp_path / "by-ray" / "results.jsonl"
        for rows in (1, 8):
            while not over.is_set() and (not journal.exists() or journal.read_bytes().count(b"\n") < rows):
                time.sleep(0.01)
            while not over.is_set() and len(killed) < (rows > 1) + 1:
                time.sleep(0.005)
                for process in _at_work()[:1]:
                    with suppress(psutil.Error):
                        process.kill()
                        killed.append(process.pid)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        pair = ("--from", "old.safetensors", "--to", "new.safetensors")
        ran = run("batch", "loras", *pair, "--out", "by-ray", "--ray", "auto")
    finally:
        over.set()
        killer.join()
        ray.shutdown()
    assert len(set(killed)) == 2, "it was through before its workers could be killed"
    assert ran.code == 0, ran.err
    batch(["loras"], tmp_path / "here")
    assert contents(tmp_path / "by-ray") == contents(tmp_path / "here")
    names = Counter(row["name"] for row in lines(tmp_path / "by-ray"))
    assert len(names) == len(lines(tmp_path / "here"))
    assert set(names.values()) == {1}
    assert {row["attempts"] for row in lines(tmp_path / "by-ray")} in ({1, 2}, {1, 3})


def through_ray(monkeypatch: pytest.MonkeyPatch, work: Any, names: Iterable[str], **system: Any) -> dict[str, BatchRow]:
    """What becomes of rows whose work is another; each is begun at most twice."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr("regraft.batch.on_ray._do", work)
    started = {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(**started, _system_config=system)
    try:
        rows = [Row("/a", name, "old", "new", RowOptions()) for name in names]
        found = [result for _, result in RayExecutor(ray, retries=1).run([(row, None) for row in rows], None)]  # type: ignore[misc]
    finally:
        ray.shutdown()
    return {row.name: row for row in found if isinstance(row, BatchRow)}


def test_a_row_that_kills_each_worker_of_ray_is_given_up_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(row: Row, *rest: object) -> BatchRow:
        if row.name == "deadly":
            os._exit(1)
        if row.name == "lacking":
            raise ModuleNotFoundError("No module named 'regraft'")
        return failed(row, ValueError("reached"))

    told = through_ray(monkeypatch, work, ("b", "deadly", "lacking", "c"))
    assert ("died 2 times" in told["deadly"].reason, told["deadly"].attempts) == (True, 2)
    assert told["lacking"].reason == "ModuleNotFoundError: No module named 'regraft'"
    assert [(told[name].reason, told[name].attempts) for name in "bc"] == [("ValueError: reached", 1)] * 2


def test_rays_memory_monitor_ends_a_row_as_often_as_it_is_begun_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(row: Row, *rest: object) -> BatchRow:
        time.sleep(60)
        return failed(row, ValueError("not ended"))

    # Any memory is too much, and looked for all the time.
    system = {"memory_usage_threshold": 0.0001, "memory_monitor_refresh_ms": 100, "min_memory_free_bytes": -1}
    told = through_ray(monkeypatch, work, ("large",), **system)
    assert ("died 2 times" in told["large"].reason, told["large"].attempts) == (True, 2)


def _at_work() -> list[psutil.Process]:
    """Ray's workers that have a row: Ray renames them after their task."""
    return [process for process in psutil.Process().children(recursive=True) if _title(process).startswith("ray::_do")]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_no_ray_is_told_in_one_line(here: Path, run: Run) -> None:
    pytest.importorskip("ray")
    ran = run("batch", "loras", "--from", "old.safetensors", "--to", "new.safetensors", "--out", "o", "--ray", "auto")
    assert ran.code == 1
    assert "no Ray at 'auto'" in ran.err
    assert "Traceback" not in ran.err


def test_from_and_to_an_object_store(here: Path, store: Any, tmp_path: Path) -> None:
    store.put(str(here / "loras"), "bucket/library", recursive=True)
    store.pipe("bucket/library/bad.safetensors", b"x" * 100)
    record = batch(["s3://bucket/library"], "s3://bucket/ported")
    assert record.counts.ported == 4
    assert record.counts.failed == 1
    batch(["loras"], here / "here")
    store.invalidate_cache()
    store.get("bucket/ported/", str(tmp_path / "fetched") + "/", recursive=True)
    assert contents(tmp_path / "fetched") == contents(here / "here")
    assert {row["name"] for row in lines(tmp_path / "fetched")} == {row.name for row in record.rows}
    assert not [name for name in store.find("bucket/ported") if "/.results" in name], "the journal is one file again"
    store.mv("bucket/library/file.safetensors", "bucket/library/renamed.safetensors")
    record = batch(["s3://bucket/library"], "s3://bucket/ported")
    assert record.counts.reused == 4
    store.invalidate_cache()
    assert store.cat("bucket/ported/renamed.safetensors") == store.cat("bucket/ported/file.safetensors")
    (here / "m.csv").write_text("adapter\ns3://bucket/library/a0\n")
    assert batch(["m.csv"], here / "one").counts.ported == 1


def test_a_library_for_servers_goes_to_an_object_store(here: Path, store: Any, run: Run) -> None:
    pair = ("--from", "old.safetensors", "--to", "new.safetensors", "--jobs", 1)
    assert run("batch", "loras", *pair, "--out", "s3://bucket/served", "--serve").code == 0
    store.invalidate_cache()
    first = store.cat("bucket/served/serving.json")
    (base,) = parse(ServingReport, first.decode()).bases
    assert [one.name for one in base.adapters] == ["a0", "a2", "file", "sub--a1"]
    for one in base.adapters:
        assert one.lorax is not None
        assert (one.lorax.adapter_id, one.lorax.adapter_source) == (f"s3://bucket/served/{one.folder}", "s3")
        assert store.exists(f"bucket/served/{one.folder}/adapter_config.json")
    assert base.vllm is None
    again = run("batch", "loras", *pair, "--out", "s3://bucket/served", "--serve")
    assert "4 of them had been done before" in again.out
    store.invalidate_cache()
    assert store.cat("bucket/served/serving.json") == first
