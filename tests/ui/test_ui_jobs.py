"""Jobs of the page run in a process of their own, are told as they go, and are stopped without harm."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.demo import data_folder
from regraft.errors import OutputError, UsageError
from regraft.report.schema import CheckReport, PortReport
from regraft.ui import places
from regraft.ui.asked import Asked, base_of, cleaned, prompts_of
from regraft.ui.desk import Desk, Progress
from regraft.ui.work import free_stem, port
from regraft.ui.worker import Told, Worker, _done

DATA = data_folder()
STYLE = DATA / "loras" / "style-v1.safetensors"


def _asked(out: Path, **more: object) -> Asked:
    given = {"lora": str(STYLE), "old": str(DATA / "v1"), "new": str(DATA / "v1"), "out": str(out), **more}
    return Asked(**given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def desk(tmp_path: Path, worker: Worker) -> Desk:
    return Desk(tmp_path / "out", worker=worker)


def _ended(job: Progress, seconds: float = 120) -> Progress:
    until = time.monotonic() + seconds
    while job.state == "running":
        assert time.monotonic() < until, f"{job.title} is at {job.done} of {job.total}: {job.what}"
        time.sleep(0.05)
    return job


def test_what_people_paste_is_read_as_a_path() -> None:
    assert cleaned(' "/a b/x.safetensors" ') == "/a b/x.safetensors"
    assert cleaned("file:///a%20b/x.ckpt") == "/a b/x.ckpt"
    assert cleaned("~model.safetensors") == "~model.safetensors"
    assert cleaned("~/x.pt") == str(Path.home() / "x.pt")
    assert cleaned(None) == cleaned("  ") == ""
    assert cleaned("org/name") == "org/name"


def test_a_picked_description_stands_for_its_folder() -> None:
    assert base_of("/models/sd/model_index.json") == "/models/sd"
    assert base_of("/models/sd.safetensors") == "/models/sd.safetensors"


def test_prompts_are_lines() -> None:
    assert prompts_of("a cat\n\n  a dog \n") == ("a cat", "a dog")
    assert prompts_of(None) == ()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="The old base is missing"):
        _asked(tmp_path, old="")


def test_an_output_never_takes_the_name_of_another(tmp_path: Path) -> None:
    asked = _asked(tmp_path)
    first = free_stem(asked, "ported")
    assert first.name == "style-v1-ported"
    (tmp_path / "style-v1-ported.html").touch()
    assert free_stem(asked, "ported").name == "style-v1-ported-2"
    (tmp_path / "style-v1-ported-2_high_noise.safetensors").touch()
    assert free_stem(asked, "ported").name == "style-v1-ported-3"
    # A disk that tells no capitals apart has one name for both.
    assert free_stem(_asked(tmp_path, lora="/loras/STYLE-v1.pt"), "ported").name == "STYLE-v1-ported-3"


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be made"):
        free_stem(_asked(tmp_path / "file" / "out"), "ported")


@pytest.mark.parametrize("name", ["../../etc/passwd", "<img src=x>.safetensors", "a b;rm -rf.pt", "…", "x" * 300])
def test_an_output_stays_in_its_folder_whatever_the_input_is_called(tmp_path: Path, name: str) -> None:
    stem = free_stem(_asked(tmp_path, lora=f"/loras/{name}"), "ported")
    assert stem.parent == tmp_path
    assert all(c.isalnum() or c in "-_" for c in stem.name)
    assert len(stem.name) < 100


def test_a_port_between_equal_bases_is_the_same_tensors(tmp_path: Path) -> None:
    made = port(_asked(tmp_path), tick=lambda *told: None)
    assert isinstance(made.record, PortReport)
    written, original = load_file(made.files[0]), load_file(STYLE)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)
    assert "regraft" in Path(made.page).read_text(encoding="utf-8")


def test_a_job_says_how_far_it_is_and_what_it_made(desk: Desk) -> None:
    job = _ended(desk.start("forecast", "Forecast", asked=_asked(desk.out), probe=False))
    assert (job.state, job.wrong) == ("done", ("", ""))
    assert job.change > 2
    assert isinstance(desk.results["forecast"].record, CheckReport)
    assert desk.results["forecast"].record.verdict == "survives"


def test_a_job_of_several_threads_sends_one_message_after_the_other() -> None:
    class Line:
        """As a pipe is: two threads that write at once mix what they write."""

        def __init__(self) -> None:
            self.sent: list[Told] = []
            self.inside, self.second = threading.Lock(), threading.Event()

        def send(self, told: Told) -> None:
            if not self.inside.acquire(blocking=False):
                self.second.set()
                return
            self.second.wait(0.3 if not self.sent else 0)
            self.sent.append(told)
            self.inside.release()

    def job(tick: Callable[[int, int, str], None]) -> str:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda i: tick(i, 4, ""), range(4)))
        return "made"

    line = Line()
    assert _done(line, job, {}) == Told("done", "made")  # type: ignore[arg-type]
    assert sorted(told.said[0] for told in line.sent) == [0, 1, 2, 3]


def test_an_error_comes_as_words_and_the_worker_goes_on(desk: Desk, tmp_path: Path) -> None:
    job = _ended(desk.start("forecast", "Forecast", asked=_asked(desk.out, lora=str(tmp_path / "no.pt")), probe=False))
    assert job.state == "error"
    assert "no such file" in job.wrong[0]
    assert "Traceback" not in job.wrong[0]
    assert _ended(desk.start("forecast", "Forecast", asked=_asked(desk.out), probe=False)).state == "done"


def test_a_refusal_writes_nothing(desk: Desk) -> None:
    job = _ended(desk.start("port", "Port", asked=_asked(desk.out, new=str(DATA / "v2-retrained"))))
    assert job.state == "error"
    assert not desk.out.exists() or not list(desk.out.iterdir())


def test_one_job_at_a_time(desk: Desk) -> None:
    job = desk.start("forecast", "Forecast", asked=_asked(desk.out), probe=False)
    with pytest.raises(UsageError, match="still at work"):
        desk.start("port", "Port", asked=_asked(desk.out))
    _ended(job)


def test_a_stop_leaves_nothing_and_the_worker_goes_on(desk: Desk) -> None:
    job = desk.start("port", "Port", asked=_asked(desk.out, new=str(DATA / "v2")))
    while job.total == 0:
        time.sleep(0.02)
    desk.stop()
    assert _ended(job).state == "stopped"
    assert not [file for file in desk.out.glob("*") if file.suffix != ".html"]
    assert _ended(desk.start("forecast", "Forecast", asked=_asked(desk.out), probe=False)).state == "done"


def test_a_stop_asked_for_twice_or_too_late_harms_no_later_job(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.ui.worker._PATIENCE", 1.0)
    job = desk.start("port", "Port", asked=_asked(desk.out, new=str(DATA / "v2")))
    while job.total == 0:
        time.sleep(0.02)
    desk.stop()
    desk.stop()
    _ended(job)
    desk.worker.stop()
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        assert _ended(desk.start("forecast", "Forecast", asked=_asked(desk.out), probe=False)).state == "done"


def test_a_port_that_is_refused_keeps_what_was_there_before(desk: Desk) -> None:
    _ended(desk.start("port", "Port", asked=_asked(desk.out)))
    made = desk.results["port"]
    job = desk.start("forecast", "Forecast", asked=_asked(desk.out), probe=False)
    with pytest.raises(UsageError):
        desk.start("port", "Port", asked=_asked(desk.out))
    _ended(job)
    assert desk.results["port"] is made
    assert made.asked == _asked(desk.out)


def test_a_worker_that_cannot_begin_is_an_error_and_not_a_job_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    monkeypatch.setattr(desk.worker, "start", lambda: (_ for _ in ()).throw(OSError("no more processes")))
    job = _ended(desk.start("forecast", "Forecast", asked=_asked(tmp_path), probe=False))
    assert "no more processes" in job.wrong[0]
    assert desk.running is None


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_a_killed_worker_is_told_of_and_replaced(desk: Desk) -> None:
    job = desk.start("port", "Port", asked=_asked(desk.out, new=str(DATA / "v2")))
    while job.total == 0:
        time.sleep(0.02)
    os.kill(desk.worker._process.pid, signal.SIGKILL)
    assert _ended(job).state == "error"
    assert "memory" in job.wrong[0]
    assert _ended(desk.start("forecast", "Forecast", asked=_asked(desk.out), probe=False)).state == "done"


def test_a_library_is_forecast_by_its_folder(desk: Desk, tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    loras.mkdir()
    tensors = load_file(STYLE)
    for name in ("a", "b"):
        save_file(tensors, loras / f"{name}.safetensors")
    ends = {"folder": str(loras), "old": str(DATA / "v1"), "new": str(DATA / "v2-retrained")}
    job = _ended(desk.start("library", "Library", out=str(desk.out), forecast_only=True, **ends))
    assert job.state == "done", job.wrong
    first = desk.results["library"]
    assert first.record.counts.refused == 2
    assert Path(first.page).is_file()
    # Another new base has a place of its own: what was made for the first one stays.
    ends["new"] = str(DATA / "v1")
    _ended(desk.start("library", "Library", out=str(desk.out), forecast_only=False, **ends))
    second = desk.results["library"]
    assert second.record.counts.ported == 2
    assert second.page != first.page
    assert Path(first.page).is_file()


def test_only_what_was_handed_out_is_served(desk: Desk, tmp_path: Path) -> None:
    token = desk.serve(str(tmp_path / "x"))
    assert desk.serve(str(tmp_path / "x")) == token
    assert desk.served(token) == tmp_path / "x"
    assert desk.served("../x") is None


def test_what_was_used_comes_first_the_next_time() -> None:
    places.remember("/a", "/b")
    places.remember("/b", "/c")
    assert places.recent() == ["/b", "/c", "/a"]


@pytest.mark.parametrize("kept", ["", "[]", '{"bases": "no"}', '{"bases": [1, "/a"]}', "{"])
def test_a_damaged_memory_is_no_error(kept: str) -> None:
    places.remember("/a")
    file = Path(os.environ["REGRAFT_CACHE"]) / "ui.json"
    assert json.loads(file.read_text())["bases"] == ["/a"]
    file.write_text(kept)
    assert set(places.recent()) <= {"/a"}


def test_bases_are_found_below_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_BASE_BYTES", 100)
    for name, size in (
        ("checkpoints/sd/big.safetensors", 200),
        ("loras/small.safetensors", 10),
        ("llm/m/config.json", 1),
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x" * size)
    found = {Path(path).relative_to(tmp_path).as_posix() for path in places.bases_in([tmp_path, tmp_path / "no"])}
    assert found == {"checkpoints/sd/big.safetensors", "llm/m"}
