"""URLs of stores: which file system fsspec has for each, and what is said where its package is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from regraft.batch.out_place import check_out
from regraft.batch.places import fetch, is_url, put, store_of
from regraft.errors import InputError, OutputError, RegraftError

fsspec = pytest.importorskip("fsspec", reason="stores need fsspec: pip install 'regraft[batch]'")

from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402 (needs fsspec)


class Buckets(MemoryFileSystem):
    """What stands for Google's store, of which fsspec knows the class by name alone."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict[str, object]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.partition("://")[2] or path)


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    """fsspec without the file systems that it has loaded, which come back afterwards."""
    # `fsspec.registry` is a view of it.
    loaded = import_module("fsspec.registry")._registry
    before = dict(loaded)
    loaded.clear()
    yield
    loaded.clear()
    loaded.update(before)


@pytest.mark.parametrize("scheme", ["gs", "gcs"])
def test_a_bucket_of_google_is_read_and_written_by_gcsfs(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("gcsfs")
    package.GCSFileSystem = Buckets  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gcsfs", package)
    store, path = store_of(f"{scheme}://bucket/styles/ink.safetensors")
    assert type(store) is Buckets
    assert path.lstrip("/") == "bucket/styles/ink.safetensors"
    (tmp_path / "ink.safetensors").write_bytes(b"weights")
    put(tmp_path / "ink.safetensors", f"{scheme}://bucket/styles/ink.safetensors")
    # Such a store shows an object once it is whole: nothing is written under another name and moved.
    assert [name.lstrip("/") for name in store.find("bucket")] == ["bucket/styles/ink.safetensors"]
    (tmp_path / "got").mkdir()
    assert fetch(f"{scheme}://bucket/styles/ink.safetensors", tmp_path / "got").read_bytes() == b"weights"
    Buckets.store.clear()


class Server(MemoryFileSystem):
    """A store on which a file grows under its name, and that answers now and then."""

    protocol = "grows"
    store: ClassVar[dict[str, object]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refused = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.partition("://")[2] or path)

    def mv(self, path1: str, path2: str, **more: object) -> None:
        if Server.refused:
            Server.refused -= 1
            raise ConnectionError("gone")
        super().mv(path1, path2, **more)


@pytest.mark.parametrize("refused", [2, 3])
def test_of_an_upload_that_fails_nothing_is_left(refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("grows", Server, clobber=True)
    monkeypatch.setattr("regraft.batch.places.time.sleep", lambda seconds: None)
    monkeypatch.setattr(Server, "refused", refused)
    (tmp_path / "ink.safetensors").write_bytes(b"weights")
    try:
        if refused < 3:
            put(tmp_path / "ink.safetensors", "grows://styles/ink.safetensors")
        else:
            with pytest.raises(OutputError, match="does not answer"):
                put(tmp_path / "ink.safetensors", "grows://styles/ink.safetensors")
        assert Server().find("") == (["/styles/ink.safetensors"] if refused < 3 else [])
    finally:
        Server.store.clear()


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("s3://bucket/x", "s3fs"),
        ("gs://bucket/x", "gcsfs"),
        ("gcs://bucket/x", "gcsfs"),
        ("az://container/x", "adlfs"),
        ("abfs://container/x", "adlfs"),
        ("hf://org/name/x", "huggingface_hub"),
    ],
)
def test_the_package_that_a_url_lacks_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RegraftError) as told:
        store_of(url)
    scheme = url.partition("://")[0]
    assert str(told.value) == f"{url}: URLs of {scheme}:// need {package}. pip install {package}"


def test_an_output_url_that_lacks_a_package_is_no_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr("regraft.batch.places.time.sleep", lambda seconds: pytest.fail("it tries again"))
    with pytest.raises(RegraftError) as told:
        check_out([], "s3://bucket/x", overwrite=False)
    assert str(told.value) == "s3://bucket/x: URLs of s3:// need s3fs. pip install s3fs"


def test_without_fsspec_no_url_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(RegraftError, match=r"URLs need fsspec\. pip install 'regraft\[batch\]'"):
        store_of("gs://bucket/x")


def test_a_scheme_that_nobody_knows_is_no_url_to_read() -> None:
    assert is_url("nosuch://bucket/x")
    with pytest.raises(InputError, match=r"is no URL that can be read.*nosuch"):
        store_of("nosuch://bucket/x")
