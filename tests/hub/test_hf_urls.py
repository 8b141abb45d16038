"""`hf://` URLs of a batch: adapters come from repositories and go to them, by fsspec's file system of the hub."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Fault, Hub
from huggingface_hub import HfFileSystem, constants

from regraft import InputError, load_adapter
from regraft.batch import expand
from regraft.batch.options import parse_options
from regraft.batch.places import fetch, place, put, store_of
from toys import drifted, llama, lora, save_base

BYTES = b"weights" * 100


@pytest.fixture
def store(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, for a file system that has its address from its package's import, and is kept for the next who asks."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    HfFileSystem.clear_instance_cache()
    yield hub
    HfFileSystem.clear_instance_cache()


def _library(hub: Hub, tmp_path: Path) -> None:
    """A PEFT folder, one below another folder, a file, and what is none of a library's adapters."""
    files = hub.repos["org/library"] = {"README.md": b"# Styles", "old/one.safetensors": BYTES}
    (tmp_path / "people").mkdir()
    for number, name in enumerate(("ink", "people/anna")):
        lora(llama(), seed=number).save(tmp_path / name)
        for file in (tmp_path / name).iterdir():
            files[f"{name}/{file.name}"] = file.read_bytes()


def test_the_address_is_the_hubs_file_system(store: Hub) -> None:
    found, path = store_of("hf://org/library@v1/ink")
    assert type(found) is HfFileSystem
    assert path == "org/library@v1/ink"


def test_a_repository_is_a_folder_of_adapters(store: Hub, tmp_path: Path) -> None:
    _library(store, tmp_path)
    rows = expand(["hf://org/library"], "a", "b", parse_options({}))
    assert [(row.adapter, row.name) for row in rows] == [
        ("hf://org/library/ink", "ink"),
        ("hf://org/library/old/one.safetensors", "old/one.safetensors"),
        ("hf://org/library/people/anna", "people/anna"),
    ]
    (one,) = expand(["hf://org/library/peo*/*"], "a", "b", parse_options({}))
    assert one.adapter == "hf://org/library/people/anna"


def test_a_folder_and_a_file_of_a_repository_are_fetched(store: Hub, tmp_path: Path) -> None:
    _library(store, tmp_path)
    (tmp_path / "got").mkdir()
    folder = fetch("hf://org/library/people/anna", tmp_path / "got")
    assert load_adapter(folder).updates.keys() == load_adapter(tmp_path / "people" / "anna").updates.keys()
    assert fetch("hf://org/library/old/one.safetensors", tmp_path / "got").read_bytes() == BYTES
    with pytest.raises(InputError, match=r"no such file.*HF_TOKEN"):
        fetch("hf://org/nothing/one.safetensors", tmp_path / "got")


def test_a_revision_is_the_one_that_the_url_names(store: Hub, tmp_path: Path) -> None:
    _library(store, tmp_path)
    store.revisions["v1"] = "abcdef" * 6 + "abcd"
    fetch("hf://org/library@v1/old/one.safetensors", tmp_path)
    assert any("/resolve/v1/" in path for path in store.paths())
    with pytest.raises(InputError, match="no such file"):
        fetch("hf://org/library@v2/old/one.safetensors", tmp_path)


def test_a_hub_that_fails_for_a_moment_is_asked_again(store: Hub, tmp_path: Path) -> None:
    _library(store, tmp_path)
    store.faults.append(Fault("/resolve/", "503"))
    assert fetch("hf://org/library/old/one.safetensors", tmp_path).read_bytes() == BYTES


def test_an_adapter_goes_into_a_repository_with_its_config_last(store: Hub, tmp_path: Path) -> None:
    store.repos["org/ported"] = {}
    lora(llama()).save(tmp_path / "ink")
    put(tmp_path / "ink", "hf://org/ported/styles/ink")
    files = {f"styles/ink/{file.name}": file.read_bytes() for file in (tmp_path / "ink").iterdir()}
    assert store.repos["org/ported"] == files
    assert list(store.repos["org/ported"])[-1] == "styles/ink/adapter_config.json"
    place(tmp_path / "ink" / "adapter_model.safetensors", "hf://org/ported/one.safetensors")
    assert store.repos["org/ported"]["one.safetensors"] == files["styles/ink/adapter_model.safetensors"]


def batch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`regraft batch` in a process of its own: workers keep what the first batch of theirs knew of the hub."""
    command = [sys.executable, "-m", "regraft", "batch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_batch_from_one_repository_to_another(store: Hub, tmp_path: Path) -> None:
    _library(store, tmp_path)
    store.repos["org/ported"] = {}
    state = llama()
    save_base(state, tmp_path / "old.safetensors")
    save_base(drifted(state, 0.1), tmp_path / "new.safetensors")
    ends = ("--from", tmp_path / "old.safetensors", "--to", tmp_path / "new.safetensors", "--jobs", 1)
    ran = batch("hf://org/library", *ends, "--out", "hf://org/ported")
    # The file that is no adapter fails, and stops nothing.
    assert ran.returncode == 1
    assert "2 were carried over, 1 failed" in ran.stdout
    batch(tmp_path / "ink", *ends, "--out", tmp_path / "here")
    name = "ink/adapter_model.safetensors"
    wanted = hashlib.sha256((tmp_path / "here" / name).read_bytes()).hexdigest()
    assert hashlib.sha256(store.repos["org/ported"][name]).hexdigest() == wanted
    assert not [file for file in store.repos["org/ported"] if file.startswith(".")], "the journal is one file again"
    again = batch("hf://org/library", *ends, "--out", "hf://org/ported")
    assert "2 of them had been done before" in again.stdout
