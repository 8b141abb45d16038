"""Broken files and places: one line that names file, key and remedy; a non-zero exit; nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import Run
from safetensors.torch import load_file, save_file

from toys import drifted, llama, lora, save_base

PAIR = ("--from", "old.safetensors", "--to", "new.safetensors")
WEIGHTS = "lora/adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    state = llama()
    save_base(state, tmp_path / "old.safetensors")
    save_base(drifted(state, 0.1), tmp_path / "new.safetensors")
    lora(state).save(tmp_path / "lora")
    return tmp_path


def edit(tensors_of: str, **changes: torch.Tensor | None) -> None:
    tensors = load_file(tensors_of)
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, tensors_of, metadata={"format": "pt"})


def truncated() -> None:
    data = Path(WEIGHTS).read_bytes()
    Path(WEIGHTS).write_bytes(data[: len(data) // 2])


def cut_in_the_header() -> None:
    Path(WEIGHTS).write_bytes(Path(WEIGHTS).read_bytes()[:40])


def oversized_header() -> None:
    Path(WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def wrong_magic() -> None:
    Path(WEIGHTS).write_bytes(b"PK\x03\x04 this is a zip, or says so" * 10)


def empty_file() -> None:
    Path(WEIGHTS).write_bytes(b"")


def no_tensors() -> None:
    save_file({}, WEIGHTS)


def nan() -> None:
    edit(WEIGHTS, **{KEY: torch.full((4, 40), float("nan"))})


def inf() -> None:
    edit(WEIGHTS, **{KEY: torch.full((4, 40), float("inf"))})


def rank_mismatch() -> None:
    edit(WEIGHTS, **{KEY: torch.zeros(3, 40)})


def zero_rank() -> None:
    edit(WEIGHTS, **{KEY: torch.zeros(0, 40), KEY.replace("lora_A", "lora_B"): torch.zeros(24, 0)})


def half_missing() -> None:
    edit(WEIGHTS, **{KEY: None})


def no_such_module() -> None:
    stem = "base_model.model.model.layers.7.mlp.down_proj"
    edit(WEIGHTS, **{f"{stem}.lora_A.weight": torch.ones(4, 40), f"{stem}.lora_B.weight": torch.ones(24, 4)})


def other_shape() -> None:
    edit(WEIGHTS, **{KEY: torch.ones(4, 41)})


def unknown_key() -> None:
    edit(WEIGHTS, **{"base_model.model.model.layers.0.mlp.down_proj.mystery": torch.ones(3)})


def broken_config() -> None:
    Path("lora/adapter_config.json").write_text("{ not json")


BROKEN = {
    truncated: ("adapter_model.safetensors", "truncated"),
    cut_in_the_header: ("adapter_model.safetensors", "truncated"),
    oversized_header: ("adapter_model.safetensors", "header"),
    wrong_magic: ("adapter_model.safetensors", "is a zip archive"),
    empty_file: ("adapter_model.safetensors", "truncated"),
    no_tensors: ("adapter_model.safetensors", "no tensors"),
    nan: (KEY, "NaN or Inf"),
    inf: (KEY, "NaN or Inf"),
    rank_mismatch: ("down_proj", "rank"),
    zero_rank: ("down_proj", "empty"),
    half_missing: ("down_proj.lora_B", "half of the pair"),
    no_such_module: ("layers.7.mlp.down_proj", "matches no module"),
    other_shape: ("layers.0.mlp.down_proj", "(24, 40)"),
    unknown_key: ("mystery", "matches no parameter"),
    broken_config: ("adapter_config.json", "can't be read"),
}


def one_line(ran: object, *parts: str) -> None:
    assert ran.out == ""
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("regraft: ")
    for part in parts:
        assert part in lines[0]
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("breakage", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_adapter_is_told_in_one_line_and_leaves_no_file(here: Path, run: Run, breakage) -> None:
    breakage()
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    ran = run("port", "lora", *PAIR, "-o", "out")
    assert ran.code == 1
    one_line(ran, *BROKEN[breakage])
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_what_is_not_understood_can_be_left_behind_knowingly(here: Path, run: Run) -> None:
    unknown_key()
    no_such_module()
    record = run("port", "lora", *PAIR, "-o", "out", "--allow-partial", "--json").record
    assert record["counts"] == {"ported": 9, "skipped": 0, "refused": 2}
    assert {row["name"].rpartition(".")[2] for row in record["modules"] if row["status"] == "refused"} == {
        "mystery",
        "down_proj",
    }


def test_a_pickle_that_would_run_code_is_not_run(here: Path, run: Run) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, ("touch exploded",))

    Path("bomb.pt").write_bytes(pickle.dumps({"a": Bomb()}))
    torch.save({"a": Bomb()}, "zipped.pt")
    for name in ("bomb.pt", "zipped.pt"):
        for arguments in (("inspect", name), ("check", "lora", "--from", "old.safetensors", "--to", name)):
            ran = run(*arguments)
            assert ran.code == 1
            one_line(ran, name)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.mkdir(), "no model weights"),
        (lambda path: path.write_text("hello"), "is no checkpoint"),
        (lambda path: None, "no such file"),
    ],
    ids=["empty folder", "text file", "missing"],
)
def test_a_base_that_is_none_is_named(here: Path, run: Run, make, told: str) -> None:
    make(here / "base")
    ran = run("port", "lora", "--from", "old.safetensors", "--to", "base", "-o", "out")
    assert ran.code == 1
    one_line(ran, "base", told)


def test_a_shard_index_that_leaves_its_folder_is_not_followed(here: Path, run: Run) -> None:
    folder = here / "base"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../old.safetensors"}}))
    ran = run("check", "lora", "--from", "old.safetensors", "--to", "base")
    assert ran.code == 1
    one_line(ran, "outside of its folder", "../old.safetensors")


def test_nan_in_a_base_is_named(here: Path, run: Run) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit("new.safetensors", **{name: torch.full((24, 40), float("nan"))})
    ran = run("port", "lora", *PAIR, "-o", "out")
    assert ran.code == 1
    one_line(ran, "new.safetensors", name, "NaN or Inf")


def test_an_existing_output_is_kept_unless_overwritten(here: Path, run: Run) -> None:
    Path("out").mkdir()
    Path("out/precious").write_text("mine")
    ran = run("port", "lora", *PAIR, "-o", "out")
    assert ran.code == 1
    one_line(ran, "out", "exists", "--overwrite")
    assert Path("out/precious").read_text() == "mine"


def test_a_missing_output_folder_is_named(here: Path, run: Run) -> None:
    ran = run("port", "lora", *PAIR, "-o", "nowhere/out")
    assert ran.code == 1
    one_line(ran, "nowhere", "does not exist")


def test_a_full_disk_is_said_and_the_old_output_stays(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("port", "lora", *PAIR, "-o", "out", "--quiet").code == 0
    before = Path("out/adapter_model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("regraft.output.save_file", full)
    ran = run("port", "lora", *PAIR, "-o", "out", "--overwrite", "--strength", "0.5")
    assert ran.code == 1
    one_line(ran, "out", "disk is full")
    assert Path("out/adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a single process")
@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_port_says_so_and_leaves_nothing(here: Path, signal_: signal.Signals) -> None:
    # The process waits inside of the write, where a half-written file would show.
    script = (
        "import sys, time, regraft.output as output\n"
        "def slow(*args, **kwargs):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "output.save_file = slow\n"
        "sys.argv = ['regraft', 'port', 'lora', '--from', 'old.safetensors', '--to', 'new.safetensors', '-o', 'out']\n"
        "from regraft.cli import main\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "writing"
    time.sleep(0.1)
    process.send_signal(signal_)
    _, told = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "interrupted" in told
    assert "Traceback" not in told
    assert not (here / "out").exists()
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []
