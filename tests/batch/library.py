"""A small library of adapters in several formats, with its bases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from regraft import ModuleRef
from regraft.batch import expand, run_batch
from regraft.batch.local import LocalExecutor
from regraft.batch.options import parse_options
from regraft.batch.waiting import Job, Result
from regraft.batch.work import work
from regraft.report.batch_schema import BatchReport
from toys import drifted, llama, lora, save_base


def make_bases(folder: Path) -> None:
    """A base, an upgrade of it, another upgrade, and one that has nothing to do with them."""
    state = llama()
    save_base(state, folder / "old.safetensors")
    save_base(drifted(state, 0.1), folder / "new.safetensors")
    save_base(drifted(state, 0.05, seed=3), folder / "newer.safetensors")
    save_base(llama(5), folder / "unrelated.safetensors")


def make_library(folder: Path, count: int = 3) -> Path:
    """``a0``, ``a1`` … as PEFT folders, one in a folder of its own, and one more as a file."""
    state = llama()
    for number in range(count):
        home = folder / "sub" if number == 1 else folder
        home.mkdir(parents=True, exist_ok=True)
        lora(state, seed=number).save(home / f"a{number}")
    one = lora(state, seed=99)
    updates = {ModuleRef("transformer", ref.path): update for ref, update in one.updates.items()}
    replace(one, updates=updates, format="diffusers").save(folder / "file.safetensors")
    return folder


def batch(sources: Any, out: Path | str | None, *, jobs: int = 1, check: bool = False, **given: Any) -> BatchReport:
    """Run one on this machine."""
    ends = {name: str(given.pop(name)) if name in given else f"{default}.safetensors" for name, default in _ENDS}
    options = parse_options(given)
    place = str(out) if out is not None else None
    rows = expand([str(source) for source in sources], ends["source"], ends["target"], options, without=place)
    return run_batch(rows, LocalExecutor(jobs), out=place, check=check)


_ENDS = (("source", "old"), ("target", "new"))


@dataclass(frozen=True)
class Here:
    """Rows in this process, which is the only one that sees its ``memory://``."""

    name: str = "here"

    def run(self, jobs: Iterator[Job], out: str | None) -> Iterator[Result]:
        for row, fitted in jobs:
            yield (row, fitted), work(row, fitted, out)


def stored(folder: Path, url: str) -> dict[str, bytes]:
    """Put a folder into ``memory://``, and tell what lies there now."""
    fsspec = pytest.importorskip("fsspec")
    store, place = fsspec.core.url_to_fs(url)
    store.put(str(folder), place, recursive=True)
    return held(url)


def held(url: str) -> dict[str, bytes]:
    """What lies in a store below a URL."""
    import fsspec

    store, place = fsspec.core.url_to_fs(url)
    return {name: store.cat_file(name) for name in store.find(place)}


def contents(folder: Path) -> dict[str, str]:
    """Every output by name with the hash of its bytes; tables and what is hidden left out."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    shown = {file.relative_to(folder).as_posix(): file for file in files}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in shown.items()
        if not name.startswith((".", "results.", "forecast."))
    }


def lines(out: Path, stem: str = "results") -> list[dict[str, Any]]:
    """The journal."""
    return [json.loads(line) for line in (out / f"{stem}.jsonl").read_text().splitlines()]
