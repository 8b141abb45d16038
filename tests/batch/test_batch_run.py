"""A library is carried over: every adapter a row, bad ones among good, and begun again by content."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from library import Here, batch, contents, lines, make_bases, make_library
from running import Run

from regraft.batch import expand, run_batch
from regraft.batch.lean import lean
from regraft.batch.options import RowOptions, parse_options
from regraft.batch.out_place import LOCK, sweep
from regraft.batch.pairs import Fitted, PairSpec, fit_pair
from regraft.batch.rows import Row
from regraft.batch.tables import parquet
from regraft.batch.waiting import Job, Result
from regraft.batch.work import work
from regraft.errors import InputError, OutputError, Refused, RegraftError, UsageError
from regraft.report.batch_page import render_batch
from regraft.report.batch_schema import BatchPair, BatchReport, BatchRow
from regraft.report.json_schema import parse


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_bases(tmp_path)
    make_library(tmp_path / "loras")
    return tmp_path


def test_the_batch_writes_what_port_writes_with_bad_files_among_good_ones(here: Path, run: Run) -> None:
    (here / "loras" / "bad.safetensors").write_bytes(b"x" * 100)
    shutil.copytree(here / "loras" / "a0", here / "loras" / "cut")
    weights = here / "loras" / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ran = run("batch", "loras", "--from", "old.safetensors", "--to", "new.safetensors", "--out", "out", "--jobs", 2)
    assert ran.code == 1
    assert ran.err.count("\n") == 1 or "2 of 6 adapters failed" in ran.err
    assert "Traceback" not in ran.err
    assert "4 were carried over, 2 failed" in ran.out
    rows = {row["name"]: row for row in lines(here / "out")}
    assert {name: row["status"] for name, row in rows.items()} == {
        **dict.fromkeys(("a0", "a2", "sub/a1", "file.safetensors"), "ported"),
        **dict.fromkeys(("bad.safetensors", "cut"), "failed"),
    }
    port = ("port", "--from", here / "old.safetensors", "--to", here / "new.safetensors", "--weights-only")
    assert run(*port, "loras/sub/a1", "-o", "one").code == 0
    assert contents(here / "one") == contents(here / "out" / "sub" / "a1")
    assert (here / "out" / "results.html").is_file()


def test_begun_again_nothing_is_done_twice_whatever_it_is_called(here: Path) -> None:
    batch(["loras"], here / "out")
    before = contents(here / "out")
    times = {name: (here / "out" / name).stat().st_mtime_ns for name in before}
    # Two adapters take each other's names, one gets a new one, one is changed.
    for old, new in (("a0", "t"), ("a2", "a0"), ("t", "a2"), ("sub/a1", "b")):
        os.rename(here / "loras" / old, here / "loras" / new)
    config = here / "loras" / "b" / "adapter_config.json"
    record = batch(["loras"], here / "out")
    assert {row.name: row.reused for row in record.rows}["file.safetensors"]
    assert {row.name: row.reused for row in record.rows}["b"]
    after = contents(here / "out")
    weights = "adapter_model.safetensors"
    assert after[f"a0/{weights}"] == before[f"a2/{weights}"]
    assert after[f"a2/{weights}"] == before[f"a0/{weights}"]
    assert after[f"b/{weights}"] == before[f"sub/a1/{weights}"]
    assert (here / "out" / "file.safetensors").stat().st_mtime_ns == times["file.safetensors"]
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 16}))
    (here / "out" / "file.safetensors").write_bytes(b"spoilt")
    record = batch(["loras"], here / "out")
    assert {row.name for row in record.rows if not row.reused} == {"b", "file.safetensors"}
    assert contents(here / "out")["file.safetensors"] == before["file.safetensors"]
    # Another strength is another result.
    record = batch(["loras"], here / "out", strength=0.5)
    assert record.counts.reused == 0


@dataclass(frozen=True)
class Weighing(Here):
    """Also notes what would travel to a worker."""

    bytes: list[int] = field(default_factory=list)

    def run(self, jobs: Iterator[Job], out: str | None) -> Iterator[Result]:
        for job in jobs:
            self.bytes.append(len(pickle.dumps(job)))
            yield job, work(*job, out)


def test_a_row_is_told_of_itself_and_not_of_a_million_others(here: Path) -> None:
    batch(["loras"], here / "out")
    journal, more, few = here / "out" / "results.jsonl", 3000, Weighing()
    rows = expand(["loras"], "old.safetensors", "new.safetensors", RowOptions())
    run_batch(rows, few, out=str(here / "out"))
    row = lines(here / "out")[0]
    with journal.open("a") as stream:
        for number in range(more):
            key = hashlib.sha256(str(number).encode()).hexdigest()[:32]
            stream.write(json.dumps({**row, "key": key, "output": f"other{number}", "name": f"other{number}"}) + "\n")
    os.rename(here / "loras" / "a0", here / "loras" / "renamed")
    many, rows = Weighing(), expand(["loras"], "old.safetensors", "new.safetensors", RowOptions())
    record = run_batch(rows, many, out=str(here / "out"))
    assert (record.counts.rows, record.counts.reused) == (4, 4)
    assert max(many.bytes) - max(few.bytes) <= 8 * more + 1000
    # The renamed one goes twice: the second time with what it is.
    assert len(many.bytes) == len(few.bytes) + 1 == 5


def test_equal_adapters_under_two_names_stay_where_they_are(here: Path) -> None:
    def again() -> BatchReport:
        rows = expand(["loras"], "old.safetensors", "new.safetensors", RowOptions())
        return run_batch(rows, Here(), out=str(here / "out"))

    shutil.copytree(here / "loras" / "a0", here / "loras" / "twin")
    again()
    before = contents(here / "out")
    times = {name: (here / "out" / name).stat().st_mtime_ns for name in before}
    noted = lines(here / "out")
    record = again()
    assert record.counts.reused == 5
    assert {name: (here / "out" / name).stat().st_mtime_ns for name in contents(here / "out")} == times
    assert lines(here / "out") == noted, "nothing is new"
    # A third one is made of one of them, and a changed twin is no longer what the first one is known by.
    shutil.copytree(here / "loras" / "a0", here / "loras" / "third")
    config = here / "loras" / "twin" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 16}))
    record = again()
    assert {row.name for row in record.rows if not row.reused} == {"twin"}
    after = contents(here / "out")
    assert [name for name in before if after[name] != before[name]] == ["twin/adapter_config.json"]
    assert after["third/adapter_model.safetensors"] == before["a0/adapter_model.safetensors"]
    shutil.rmtree(here / "loras" / "twin")
    record = again()
    assert record.counts.reused == 5


def test_pairs_and_options_by_row_each_pair_fitted_once(here: Path) -> None:
    (here / "m.csv").write_text(
        "adapter,to,method,strength\n"
        "loras/a0,new.safetensors,lora-x,1\n"
        "loras/a0,newer.safetensors,,1\n"
        "loras/a2,new.safetensors,lora-x,0.5\n"
        "loras/a2,unrelated.safetensors,,1\n"
        "loras/a2,nowhere.safetensors,,1\n"
    )
    record = batch(["m.csv"], here / "out")
    told = {(pair.target.rpartition("/")[2], pair.method, pair.rows, pair.shared) for pair in record.pairs}
    assert told == {
        ("new.safetensors", "lora-x", 2, True),
        ("newer.safetensors", "copy", 1, True),
        ("unrelated.safetensors", "copy", 1, True),
        ("nowhere.safetensors", "auto", 1, False),
    }
    assert [row.status for row in record.rows] == ["failed", "refused", "ported", "ported", "ported"]
    assert "no such file" in record.rows[0].reason
    assert "nothing to do with each other" in record.rows[1].reason
    assert len({name for row in record.rows for name in row.outputs}) == 3
    with pytest.raises(RegraftError, match="no such file"):
        batch(["loras"], here / "other", target="nowhere.safetensors")


UNEXPECTED = {
    "memory": (MemoryError(), "not enough memory"),
    "torch": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    "disk": (OSError(5, "Input/output error", "/mnt/base"), "Input/output error (/mnt/base)"),
    "bug": (KeyError("unheard of"), "KeyError: 'unheard of'"),
}


def fits_all_but(unexpected: Mapping[str, tuple[Exception, str]]) -> Any:
    def fit(spec: PairSpec, *rest: Any, **given: Any) -> Fitted:
        if (name := Path(spec.target).name) in unexpected:
            raise unexpected[name][0]
        return fit_pair(spec, *rest, **given)

    return fit


def test_a_pair_that_fails_in_an_unexpected_way_stops_no_other(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [*UNEXPECTED, "new.safetensors"]
    (here / "m.csv").write_text("adapter,to\n" + "".join(f"loras/a0,{end}\nloras/a2,{end}\n" for end in ends))
    monkeypatch.setattr("regraft.batch.run.fit_pair", fits_all_but(UNEXPECTED))
    record = batch(["m.csv"], here / "out")
    assert (record.counts.ported, record.counts.failed) == (2, 2 * len(UNEXPECTED))
    for row in record.rows[: 2 * len(UNEXPECTED)]:
        assert UNEXPECTED[Path(row.target).name][1] in row.reason
        assert "Traceback" not in row.reason
    assert all((here / "out" / name).is_file() for name in ("results.html", "results.jsonl"))


def test_where_every_pair_fails_the_tables_say_so(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.batch.run.fit_pair", fits_all_but({"new.safetensors": UNEXPECTED["memory"]}))
    ran = run("batch", "loras", "--from", "old.safetensors", "--to", "new.safetensors", "--out", "out", "--jobs", 1)
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "not enough memory" in ran.err
    assert [row["status"] for row in lines(here / "out")] == ["failed"] * 4
    assert "not enough memory" in (here / "out" / "results.html").read_text()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert batch(["loras"], here / "out").counts.ported == 4


def test_options_of_methods_and_blocks_do_what_they_do_in_port(here: Path, run: Run) -> None:
    def again(**changed: Any) -> BatchReport:
        options = parse_options({**given, **changed})
        rows = expand(["loras/a0"], "old.safetensors", "new.safetensors", options)
        return run_batch(rows, Here(), out=str(here / "out"))

    given = {"method": "lora-x", "subspace_rank": 3, "threshold": 0.1, "block_strength": "*.layers.1.*=0.5"}
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    pair = ("--from", here / "old.safetensors", "--to", here / "new.safetensors")
    assert run("port", "loras/a0", *pair, *flags, "-o", "one").code == 0
    assert again().counts.ported == 1
    assert contents(here / "one") == contents(here / "out" / "a0")
    assert again().counts.reused == 1
    # Each of them makes another result.
    for name, value in (("subspace_rank", 4), ("threshold", 0.2), ("block_strength", "*.layers.1.*=0.4")):
        assert again(**{name: value}).counts.reused == 0


def test_a_saved_migration_takes_the_place_of_the_fit(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ("--from", "old.safetensors", "--to", "new.safetensors")
    for rank in (3, 5):
        fit = ("-m", "lora-x", "--subspace-rank", rank, "--save-migration", f"m{rank}.safetensors")
        assert run("port", "loras/a0", *pair, *fit, "-o", f"fitted{rank}").code == 0
    assert run("port", "loras/a0", *pair, "--migration", "m3.safetensors", "-o", "one").code == 0
    monkeypatch.setattr("regraft.batch.pairs.fit_migration", None)

    def again(migration: str, target: str = "new.safetensors", out: str = "out") -> BatchReport:
        rows = expand(["loras/a0"], "old.safetensors", target, RowOptions(migration=migration))
        return run_batch(rows, Here(), out=str(here / out))

    record = again("m3.safetensors")
    assert [(pair.method, pair.shared, pair.note) for pair in record.pairs] == [
        ("lora-x", True, "migration m3.safetensors")
    ]
    assert contents(here / "out" / "a0") == contents(here / "one")
    assert contents(here / "fitted5") != contents(here / "one")
    # It is known by what it is, not by its name.
    (here / "m3.safetensors").rename(here / "renamed.safetensors")
    assert again("renamed.safetensors").counts.reused == 1
    assert again("m5.safetensors").counts.reused == 0
    with pytest.raises(Refused, match="made for another new base"):
        again("m5.safetensors", "newer.safetensors", "other")


def test_a_pair_that_is_refused_refuses_its_rows_and_no_others(here: Path, run: Run) -> None:
    pair = ("--from", "old.safetensors", "--to", "new.safetensors")
    assert run("port", "loras/a0", *pair, "-m", "copy", "--save-migration", "m.safetensors", "-o", "one").code == 0
    (here / "m.csv").write_text(
        "adapter,to,migration\nloras/a0,new.safetensors,m.safetensors\nloras/a2,newer.safetensors,m.safetensors\n"
    )
    rows = expand(["m.csv"], "old.safetensors", None, RowOptions())
    record = run_batch(rows, Here(), out=str(here / "out"))
    assert [(Path(row.target).name, row.status) for row in record.rows] == [
        ("newer.safetensors", "refused"),
        ("new.safetensors", "ported"),
    ]
    refused = record.rows[0]
    assert (refused.verdict, refused.remedy) == ("refused", "Fit a new one with --save-migration.")
    assert "m.safetensors: the migration was made for another new base" in refused.reason
    assert "--save-migration" not in refused.reason
    assert (record.counts.refused, record.counts.failed) == (1, 0)


def test_without_a_place_for_the_outputs_it_says_what_to_give(here: Path, run: Run) -> None:
    (here / "m.csv").write_text("adapter,from,to\nloras/a0,old.safetensors,new.safetensors\n")
    for more, told in ((), "a folder or URL"), (("--ray", "auto"), "that every machine of the cluster reaches"):
        ran = run("batch", "m.csv", *more)
        assert (ran.code, ran.err.count("\n")) == (2, 1)
        assert "--out is missing" in ran.err
        assert told in ran.err
    assert [file.name for file in here.glob("*") if "port" in file.name] == []


def test_check_forecasts_a_library_and_ports_nothing(here: Path, run: Run) -> None:
    pair = ("--from", "old.safetensors", "--to", "new.safetensors", "--jobs", 1)
    ran = run("batch", "check", "loras", *pair, "--json", "--out", "out")
    assert ran.code == 0
    record = parse(BatchReport, ran.out)
    assert record.summary == "Of your 4 LoRAs, 4 will survive the move."
    assert {row.status for row in record.rows} == {"forecast"}
    assert all(row.forecast is not None for row in record.rows)
    assert contents(here / "out") == {}
    assert len(lines(here / "out", "forecast")) == 4
    assert run("batch", "check", *pair).code == 2


def test_the_table_as_parquet_has_every_row(here: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    record = batch(["loras"], here / "out")
    table = files.read_table(here / "out" / "results.parquet").to_pylist()
    assert [row["name"] for row in table] == [row.name for row in record.rows]
    assert table[0]["modules_ported"] == 9


def test_the_table_as_parquet_is_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import BufferReader
    from pyarrow import parquet as files

    monkeypatch.setattr("regraft.batch.tables._AT_ONCE", 2)
    for number in (0, 1, 5):
        table = parquet([row_from_afar(index) for index in range(number)])
        assert table is not None
        assert [row["name"] for row in files.read_table(BufferReader(table)).to_pylist()] == [
            f"folder/a{index}" for index in range(number)
        ]


def row_from_afar(number: int) -> BatchRow:
    """A row as a worker's process gives it back."""
    name = f"folder/a{number}"
    row = BatchRow(
        adapter=f"/library/{name}",
        name=name,
        source="/bases/old",
        target="/bases/new",
        key=f"{number:032x}",
        status="ported",
        verdict="survives",
        reason="all of its modules are carried",
        counts={"ported": 96, "skipped": 0, "refused": number % 2},
        output=name,
        outputs=[name],
        output_hashes=[f"sha256:{number:064x}"],
    )
    return pickle.loads(pickle.dumps(row))


def test_a_driver_holds_rows_in_less_than_half_of_what_they_come_as() -> None:
    def bytes_of(made: Callable[[int], BatchRow]) -> int:
        gc.collect()
        tracemalloc.start()
        held = [made(number) for number in range(300)]
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(held) == 300
        return size

    assert bytes_of(lambda number: lean(row_from_afar(number))) < 0.5 * bytes_of(row_from_afar)
    for number in (1, 2):
        row = row_from_afar(number)
        assert lean(row) == row
        assert lean(row).to_json() == row.to_json()
        # Of a row that changes, no other one hears.
        changed = lean(row).model_copy(update={"reused": True, "outputs": []})
        assert (lean(row) == row, changed == row) == (True, False)


def test_output_folders_that_are_something_else_are_left_alone(here: Path) -> None:
    with pytest.raises(UsageError, match="holds the adapters themselves"):
        batch(["loras/a0"], here / "loras")
    (here / "mine").mkdir()
    (here / "mine" / "a0").write_text("of somebody else")
    with pytest.raises(OutputError, match="other things"):
        batch(["loras"], here / "mine")
    assert (here / "mine" / "a0").read_text() == "of somebody else"


def test_an_output_folder_that_can_not_be_used_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, *rest: object, **more: object) -> Any:
        raise OSError(5, "Input/output error", str(path))

    rows = [Row("/a", "a", "old", "new", RowOptions(), output="a")]
    (tmp_path / LOCK).mkdir()
    with pytest.raises(OutputError, match="can't be locked"):
        run_batch(rows, Here(), out=str(tmp_path), overwrite=True)
    (tmp_path / LOCK).rmdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", broken)
        with pytest.raises(OutputError, match=r"can't be looked into \(Input/output error\)"):
            run_batch(rows, Here(), out=str(tmp_path))
    (tmp_path / "results.jsonl").write_text("\n")
    monkeypatch.setattr(Path, "read_text", broken)
    with pytest.raises(InputError, match=r"results.jsonl.*Input/output error"):
        run_batch(rows, Here(), out=str(tmp_path))


def test_what_a_killed_worker_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    long = "a" * 60
    left = {f".{name[:40]}.abcd_123": name for name in ("back", "back.safetensors", "back_low_noise.safetensors", long)}
    left |= {".back.gguf.00000000": "", ".sub.zzzzzzzz": ""}
    kept = {".backup.20240101": "back", ".back.20240101": "adapter.safetensors", ".back.safetensors.2024010": ""}
    for folder, held in {**left, **kept}.items():
        home = tmp_path / ("sub" if folder == ".sub.zzzzzzzz" else "") / folder
        (home / held).mkdir(parents=True)
    rows = [Row("/a", name, "old", "new", RowOptions(), output=name) for name in ("back", long, "sub/sub")]
    sweep(rows, str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {*kept, "sub"}
    assert list((tmp_path / "sub").iterdir()) == []


def test_a_journal_with_a_cut_line_is_read_on(here: Path) -> None:
    batch(["loras"], here / "out")
    journal = here / "out" / "results.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    assert batch(["loras"], here / "out").counts.reused == 3
    assert batch(["loras"], here / "out").counts.reused == 4


def test_names_and_reasons_of_strangers_are_text_on_the_page() -> None:
    hostile = '<script>alert("x")</script>'
    common = {"source": hostile, "target": "new", "key": "k"}
    rows = [
        BatchRow(
            adapter="/a", name=f"{hostile}.safetensors", status="refused", reason=hostile, remedy=hostile, **common
        ),
        BatchRow(adapter="/b", name="b", status="ported", format=hostile, method=hostile, **common),
    ]
    record = BatchReport(
        check=False,
        summary=hostile,
        counts={"rows": 2},
        pairs=[BatchPair(source=hostile, target="/home/me/new", method=hostile, shared=True, note=hostile, rows=2)],
        executor=hostile,
        rows=rows,
        seconds=1.0,
    )
    page = render_batch(record)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8
    assert "/home/me" not in page
    assert page.index("Refused") < page.index("Survive")
