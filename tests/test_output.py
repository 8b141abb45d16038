"""Files are written whole or not at all, and nothing of the user's goes with what is replaced."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import regraft.output as output
from regraft.adapter import Adapter
from regraft.errors import OutputError
from regraft.formats import Written
from regraft.output import check_writable, sort_metadata, write_text, write_whole

FOLDER = Written({"a": torch.ones(2)}, {"format": "pt"}, {"adapter_config.json": "{}\n"}, folder=True)
FILE = Written({"a": torch.ones(2)}, {"format": "pt"})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter folder with more in it than an adapter."""
    folder = tmp_path / "lora"
    (folder / "checkpoint-5").mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"old": 1}')
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-5" / "state").write_text("mine too")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_adapter_folder_is_replaced_and_other_files_in_it_are_kept(adapter: Path) -> None:
    (adapter / "notes.txt").chmod(0o600)
    written = write_whole(FOLDER, adapter, overwrite=True)
    assert {path.name for path in written} == {"adapter_model.safetensors", "adapter_config.json"}
    assert torch.equal(load_file(adapter / "adapter_model.safetensors")["a"], torch.ones(2))
    assert (adapter / "adapter_config.json").read_text() == "{}\n"
    assert (adapter / "notes.txt").read_text() == "mine"
    assert (adapter / "checkpoint-5" / "state").read_text() == "mine too"
    assert [path.name for path in adapter.parent.iterdir()] == ["lora"]
    if os.name == "posix":
        assert (adapter / "notes.txt").stat().st_mode & 0o777 == 0o600


def test_files_are_kept_on_a_disk_without_hard_links(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    write_whole(FOLDER, adapter, overwrite=True)
    assert (adapter / "checkpoint-5" / "state").read_text() == "mine too"


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_whole(FOLDER, tmp_path / "out", overwrite=True)
    assert set(content(tmp_path / "out")) == {"adapter_model.safetensors", "adapter_config.json"}


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "stuff").mkdir()
    (tmp_path / "stuff" / "thesis.tex").write_text("years of work")
    for written in (FOLDER, FILE):
        with pytest.raises(OutputError, match=r"stuff: is a folder of other things .* Choose another name"):
            write_whole(written, tmp_path / "stuff", overwrite=True)
    assert content(tmp_path / "stuff") == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("empty", [False, True])
def test_a_file_never_replaces_a_folder(adapter: Path, empty: bool) -> None:
    if empty:
        adapter = adapter.parent / "empty"
        adapter.mkdir()
    before = content(adapter)
    with pytest.raises(OutputError, match="is a folder, and the output is a file"):
        write_whole(FILE, adapter, overwrite=True)
    with pytest.raises(OutputError, match="is a folder, and the output is a file"):
        write_text("report", adapter, overwrite=True)
    assert content(adapter) == before


def test_a_folder_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file, and the output is a folder"):
        write_whole(FOLDER, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", [".", "..", "inner/..", "../lora"])
def test_the_current_folder_and_those_above_are_never_replaced(
    adapter: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter / "inner").mkdir()
    monkeypatch.chdir(adapter)
    before = content(adapter)
    with pytest.raises(OutputError, match="is the current folder, or one above it"):
        check_writable(Path(name), overwrite=True)
    assert content(adapter) == before


def test_a_folder_that_holds_the_input_is_never_replaced(adapter: Path) -> None:
    source = adapter / "checkpoint-5"
    with pytest.raises(OutputError, match="holds the input checkpoint-5"):
        write_whole(FOLDER, adapter, overwrite=True, source=source)
    write_whole(FOLDER, adapter, overwrite=True, source=adapter)


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links and devices")
def test_links_and_devices(adapter: Path) -> None:
    link = adapter.parent / "link"
    link.symlink_to(adapter)
    write_whole(FOLDER, link, overwrite=True)
    assert link.is_symlink()
    assert torch.equal(load_file(adapter / "adapter_model.safetensors")["a"], torch.ones(2))
    with pytest.raises(OutputError, match="is no regular file"):
        check_writable(Path("/dev/null"), overwrite=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a single process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("at_once", [True, False], ids=["one step", "two steps"])
def test_an_interrupt_at_any_step_of_the_swap_leaves_old_or_new_whole(
    adapter: Path, number: signal.Signals, step: int, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(output, "_exchange", lambda *_: False)
    elif step > 3:
        pytest.skip("one step has fewer moments")
    old = content(adapter)
    steps = itertools.count()
    true_replace, true_rmtree = os.replace, output.shutil.rmtree

    def interrupted(call: object) -> object:
        def run(*args: object, **kwargs: object) -> object:
            if next(steps) == step:
                signal.raise_signal(number)
            result = call(*args, **kwargs)
            if next(steps) == step:
                signal.raise_signal(number)
            return result

        return run

    monkeypatch.setattr(os, "replace", interrupted(true_replace))
    monkeypatch.setattr(output, "_exchange", interrupted(output._exchange))
    monkeypatch.setattr(output.shutil, "rmtree", interrupted(true_rmtree))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_whole(FOLDER, adapter, overwrite=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    now = content(adapter)
    new = {**old, "adapter_config.json": b"{}\n", "adapter_model.safetensors": now["adapter_model.safetensors"]}
    assert now in (old, new)
    assert [path.name for path in adapter.parent.iterdir()] == ["lora"]


def test_a_swap_that_fails_puts_the_old_folder_back(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, true_replace = content(adapter), os.replace

    def fails_once(source: Path, target: Path) -> None:
        if source.name == target.name == "lora":
            raise OSError("device trouble")
        true_replace(source, target)

    monkeypatch.setattr(output, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OutputError, match="device trouble"):
        write_whole(FOLDER, adapter, overwrite=True)
    assert content(adapter) == old


def test_the_same_content_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from regraft.formats import Written\n"
        "from regraft.output import write_whole\n"
        "metadata = {f'ss_key_{i}': str(i) for i in range(9)}\n"
        "tensors = {'b': torch.ones(3), 'a': torch.zeros(2, 2)}\n"
        "for i in range(3):\n"
        "    write_whole(Written(tensors, metadata), Path(f'{sys.argv[1]}-{i}.safetensors'), overwrite=False)\n"
    )
    for run in range(2):
        subprocess.run([sys.executable, "-c", script, tmp_path / str(run)], check=True)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    assert len(list(tmp_path.iterdir())) == 6


def test_sorting_the_metadata_changes_nothing_but_its_order(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    odd = {"z": 'quotes " and \\ and /', "ü": "‖Δ‖ 😀", "c": "\n\r\t\b\f\x00\x1f\x7f\u2028", "": "", "a": '{"j": [1]}'}
    tensors = {"weight": torch.arange(6.0).reshape(2, 3), "half ü": torch.ones(3, dtype=torch.float16)}
    files = set()
    for _ in range(6):
        save_file(tensors, path, metadata=odd)
        size = path.stat().st_size
        sort_metadata(path)
        assert path.stat().st_size == size
        files.add(path.read_bytes())
    assert len(files) == 1
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == odd
        assert all(torch.equal(handle.get_tensor(key), tensor) for key, tensor in tensors.items())


def test_a_file_without_metadata_is_left_as_it_is(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    sort_metadata(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e5m2])
def test_numbers_that_overflow_are_not_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"fine": torch.ones(2), "broken": torch.full((2,), float("inf")).to(dtype)}
    with pytest.raises(OutputError, match=r"out.safetensors: broken: would hold NaN or Inf in float\d+.*strength"):
        write_whole(Written(tensors, {}), tmp_path / "out.safetensors", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_which_nothing_is_left_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nothing is left to write"):
        Adapter({}, "kohya").save(tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []
