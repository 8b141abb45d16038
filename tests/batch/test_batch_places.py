"""Libraries and outputs in a store: what is the user's is never written over, and what was ported is no input."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, main_thread
from typing import Any

import pytest
from library import Here, held, make_bases, make_library, stored

from regraft.batch import Row, expand, run_batch
from regraft.batch.options import RowOptions
from regraft.batch.out_place import check_out
from regraft.batch.pairs import Fitted, PairSpec, fit_pair
from regraft.batch.places import is_inside, location, without_slash, write_text_to
from regraft.batch.waiting import Job, Result
from regraft.errors import OutputError, UsageError
from regraft.report.batch_schema import BatchReport


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    make_bases(tmp_path)
    make_library(tmp_path / "loras", 2)
    make_library(tmp_path / "more", 3)
    stored(tmp_path / "loras", "memory://lib")
    yield tmp_path
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def rows_of(source: str, without: str | None = None) -> list[Row]:
    return expand([source], "old.safetensors", "new.safetensors", RowOptions(), without=without)


def batch(source: str, out: str, **given: Any) -> BatchReport:
    return run_batch(rows_of(source, out), Here(), out=out, **given)


def test_places_are_compared_part_by_part() -> None:
    pytest.importorskip("fsspec")
    inside = [
        ("memory://lib/ported/a", "memory://lib/ported"),
        ("memory://lib/ported", "memory:///lib//ported/"),
        ("memory://lib/x/../ported/a", "memory://lib/ported"),
        ("zz://bucket/a", "zz://bucket"),
        ("file:///lib/a", "/lib"),
        ("hf://org/lib@main/a", "hf://org/lib"),
        ("hf://org/lib/a", "hf://org/lib@main"),
        ("hf://datasets/org/lib/styles/a", "hf://datasets/org/lib@main/styles"),
        ("hf://org/lib@refs/pr/1/a", "hf://org/lib@refs%2Fpr%2F1"),
        ("hf://models/org/lib@main", "hf://org"),
    ]
    outside = [
        ("memory://lib/ported-2/a", "memory://lib/ported"),
        ("memory://lib", "memory://lib/ported"),
        ("zz://lib/a", "memory://lib"),
        ("/lib/a", "memory://lib"),
        ("org/name", "memory://org"),
        ("hf://org/lib@ported/a", "hf://org/lib"),
        ("hf://datasets/org/lib/a", "hf://org/lib"),
        ("hf://org/lib/refs/pr/1", "hf://org/lib@refs/pr/1"),
    ]
    assert [is_inside(place, location(folder)) for place, folder in inside] == [True] * len(inside)
    assert [is_inside(place, location(folder)) for place, folder in outside] == [False] * len(outside)


def test_a_repository_on_the_hub_lies_in_no_folder(here: Path) -> None:
    for name in ("org/name", "org/name@v1:styles/ink.safetensors"):
        (row,) = rows_of(name, without=str(here))
        check_out([row], str(here), overwrite=True)
    (here / "loras" / "name").mkdir()
    # What lies on the disk by that name is what is meant.
    assert is_inside("loras/name", location(str(here)))
    assert not is_inside("org/name", location(str(here)))


@pytest.mark.parametrize(
    ("place", "same"),
    [
        ("s3://bucket/ported/", "s3://bucket/ported"),
        ("s3://bucket//", "s3://bucket"),
        ("memory://", "memory://"),
        ("memory:///", "memory://"),
        ("/", "/"),
    ],
)
def test_a_slash_at_the_end_of_a_url_says_nothing_more(place: str, same: str) -> None:
    assert without_slash(place) == same


@pytest.mark.parametrize(("first", "second"), [("memory://out/", "memory://out"), ("memory://out", "memory://out//")])
def test_a_second_run_finds_the_first_with_and_without_a_slash(here: Path, first: str, second: str) -> None:
    assert batch("loras", first).counts.ported == 3
    assert not [name for name in held("memory://out") if "//" in name]
    assert batch("loras", second).counts.reused == 3


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", ["memory://lib", "memory:///lib/", "memory://"])
def test_adapters_in_a_store_are_not_written_over(here: Path, out: str, overwrite: bool) -> None:
    before = held("memory://lib")
    for source in ("memory://lib/file.safetensors", "memory://lib", "memory://lib/*"):
        with pytest.raises(UsageError, match="holds the adapters themselves"):
            batch(source, out, overwrite=overwrite)
    # Nor where the rows were found by somebody who did not say where the outputs go.
    with pytest.raises(UsageError, match="holds the adapters themselves"):
        run_batch(rows_of("memory://lib/file.safetensors"), Here(), out=out, overwrite=overwrite)
    assert held("memory://") == before


def test_a_place_in_a_store_that_holds_other_things_is_left_alone(here: Path) -> None:
    stored(here / "loras" / "file.safetensors", "memory://mine/file.safetensors")
    before = held("memory://mine")
    with pytest.raises(OutputError, match="holds other things"):
        batch("loras", "memory://mine")
    with pytest.raises(OutputError, match="is a file"):
        batch("loras", "memory://mine/file.safetensors", overwrite=True)
    assert held("memory://mine") == before
    assert batch("loras", "memory://mine", overwrite=True).counts.ported == 3
    assert held("memory://mine")["/mine/file.safetensors"] != before["/mine/file.safetensors"]


def test_what_was_ported_into_a_folder_of_the_library_is_no_input(here: Path) -> None:
    assert batch("memory://lib", "memory://lib/ported").counts.rows == 3
    stored(here / "more" / "a2", "memory://lib/ported-by-hand")
    again = batch("memory://lib", "memory://lib/ported")
    assert (again.counts.rows, again.counts.reused) == (4, 3)
    assert {row.name for row in again.rows} == {"a0", "sub/a1", "file.safetensors", "ported-by-hand"}
    assert batch("memory://lib/**", "memory://lib/ported").counts.reused == 4


def test_a_driver_that_was_killed_before_it_noted_anything_comes_back(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*given: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr("regraft.batch.journal.Journal.note", killed)
        with pytest.raises(SystemExit):
            batch("memory://lib", "memory://out")
    assert any(name.endswith(".safetensors") for name in held("memory://out"))
    assert batch("memory://lib", "memory://out").counts.ported == 3


def test_what_another_driver_notes_while_a_journal_is_closed_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(text: str, place: str) -> None:
        write_text_to(text, place)
        if place.endswith("/results.jsonl"):
            write_text_to("theirs\n", "memory://out/.results/9.jsonl")

    monkeypatch.setattr("regraft.batch.journal.write_text_to", write)
    batch("memory://lib", "memory://out")
    assert {name: text for name, text in held("memory://out").items() if "/.results/" in name} == {
        "/out/.results/9.jsonl": b"theirs\n"
    }
    monkeypatch.undo()
    monkeypatch.chdir(here)
    batch("memory://lib", "memory://out")
    assert held("memory://out")["/out/results.jsonl"].splitlines().count(b"theirs") == 1


def test_a_driver_that_is_killed_while_it_closes_its_journal_notes_nothing_twice(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*given: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr("regraft.batch.journal.Journal._remove", killed)
        with pytest.raises(SystemExit):
            batch("memory://lib", "memory://out")
    assert [name for name in held("memory://out") if "/.results/" in name]
    assert batch("memory://lib", "memory://out").counts.reused == 3
    noted = held("memory://out")["/out/results.jsonl"].splitlines()
    assert len(noted) == len(set(noted)) == 3
    assert not [name for name in held("memory://out") if "/.results/" in name]


@dataclass(frozen=True)
class Stopped(Here):
    """Ctrl-C, or SIGTERM, after two rows."""

    def run(self, jobs: Iterator[Job], out: str | None) -> Iterator[Result]:
        for number, result in enumerate(super().run(jobs, out)):
            if number == 2:
                raise KeyboardInterrupt
            yield result


def test_what_was_done_before_ctrl_c_is_known_in_a_store(here: Path) -> None:
    rows, out = rows_of("memory://lib"), "memory://ported"
    with pytest.raises(KeyboardInterrupt):
        run_batch(rows, Stopped(), out=out)
    # The third one's output lies there, too: it was made, and not noted.
    record = run_batch(rows, Here(), out=out)
    assert (record.counts.ported, record.counts.reused) == (3, 2)
    assert [name for name in held(out) if "/.results" in name] == []


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal to a thread")
def test_ctrl_c_does_not_wait_for_a_fit_before_it_says_what_is_done(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted, seen, ended = Event(), Event(), Event()

    def fit(spec: PairSpec, *rest: Any, **given: Any) -> Fitted:
        if Path(spec.target).name == "newer.safetensors":
            noted.wait(20)
            # A signal that comes just before a thread begins to wait does not wake it: it is to be waiting by then.
            time.sleep(0.5)
            signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
            seen.wait(20)
            ended.set()
        return fit_pair(spec, *rest, **given)

    monkeypatch.setattr("regraft.batch.run.fit_pair", fit)
    (here / "m.csv").write_text("adapter,to\n" + "".join(f"loras/a0,{end}.safetensors\n" for end in ("new", "newer")))
    try:
        with pytest.raises(KeyboardInterrupt):
            run_batch(rows_of("m.csv"), Here(), out="memory://ported", tick=lambda *told: noted.set())
        assert not ended.is_set()
        (part,) = [text for name, text in held("memory://ported").items() if "/.results" in name and text]
        assert part.count(b"\n") == 1
    finally:
        seen.set()
