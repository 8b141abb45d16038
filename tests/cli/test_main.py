"""The console script: one line and an exit code for what can go wrong, and streams that take every character."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import Run

import regraft.cli.cache
import regraft.cli.inspect
from regraft.cli import VERBS
from regraft.cli._sink import prepare_terminal

REAL = Path(__file__).parents[1] / "data" / "analog_svd_rank4.safetensors"


def failing(error: BaseException) -> object:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"), "not enough memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "not enough memory",
        ),
        (MemoryError(), "not enough memory"),
        (torch.linalg.LinAlgError("linalg.svd: did not converge"), "could not be decomposed (linalg.svd: did not"),
    ],
    ids=["GPU memory", "CPU memory", "Python memory", "decomposition"],
)
def test_what_the_machine_or_the_weights_refuse_is_one_line(
    error: BaseException, line: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regraft.cli.inspect, "inspect_adapter", failing(error))
    ran = run("inspect", REAL)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("regraft: ")
    assert line in ran.err
    assert len(ran.err.splitlines()) == 1


def test_a_bug_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regraft.cli.inspect, "inspect_adapter", failing(RuntimeError("a bug of ours")))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run("inspect", REAL)


@pytest.mark.parametrize("arguments", [("inspect", REAL), ("cache", "list"), ("cache", "clear")])
def test_an_interrupt_is_one_line_in_every_verb(
    arguments: tuple[object, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regraft.cli.inspect, "inspect_adapter", failing(KeyboardInterrupt()))
    monkeypatch.setattr(regraft.cli.cache, "cached_files", failing(KeyboardInterrupt()))
    ran = run(*arguments)
    assert ran.code == 130
    assert ran.out == ""
    assert ran.err == "regraft: interrupted: nothing is half-written\n"


def test_what_there_is_is_said_without_torch() -> None:
    script = (
        "import sys\nfrom regraft.cli import app\ntry:\n    app(['--help'])\n"
        "finally:\n    assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(f"  {verb}" in ran.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_listed_by_its_own_first_words(verb: str, run: Run) -> None:
    ran = run(verb, "--help")
    assert ran.code == 0
    assert VERBS[verb].rstrip(".") in " ".join(ran.out.split())


def test_the_package_gives_functions_whatever_was_imported_first() -> None:
    script = (
        "import regraft.port, regraft.verify, regraft\nfrom regraft.check import check_migration\n"
        "import types\nassert not any(isinstance(getattr(regraft, n), types.ModuleType) for n in regraft.__all__)\n"
        "assert set(regraft.__all__) <= set(dir(regraft))\n"
        "assert {n for n in regraft.__all__ if n != '__version__'} == set(regraft._WHERE)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = regraft.nothing


def test_a_cached_file_that_cannot_be_deleted_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(b"12")
    monkeypatch.setattr("regraft.cache.cached_files", lambda: [tmp_path / "gone.safetensors", kept])
    monkeypatch.setattr(Path, "unlink", failing(PermissionError(13, "Permission denied")))
    ran = run("cache", "clear")
    assert ran.code == 1
    assert ran.out == ""
    assert f"{kept}: can't be deleted (Permission denied)" in " ".join(ran.err.split())


def test_piped_output_is_utf8_whatever_the_code_page(tmp_path: Path) -> None:
    file = tmp_path / "Δ‖ü.safetensors"
    file.write_bytes(REAL.read_bytes())
    # As on Windows: streams are opened in cp1252 before main begins.
    script = (
        "import sys\nsys.stdout.reconfigure(encoding='cp1252', errors='strict')\nfrom regraft.cli import main\nmain()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, "inspect", str(file), "--json"], capture_output=True, check=True
    )
    assert json.loads(ran.stdout.decode("utf-8"))["file"] == str(file)


def test_a_terminal_keeps_its_code_page_and_replaces_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    terminal = Terminal(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    prepare_terminal()
    terminal.write("ü Δ")
    terminal.flush()
    assert terminal.buffer.getvalue() == "ü ?".encode("cp1252")
