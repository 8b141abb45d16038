"""Memory and time stay bounded by a file's true size, whatever the file claims."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attack_cases import DOWN, UP, good
from cases_torch import Calls, _nested
from safetensors.torch import save_file

import regraft.lineage.name_sets as name_sets
from regraft import load_adapter, open_base
from regraft.errors import RegraftError
from regraft.names import resolve_names
from regraft.patterns import Pattern

MB = 1 << 20
# What torch, Python and the families' tables take before any file is opened, and a little more.
CHILD = """
import resource, sys, time
import torch
from regraft.cli import main
from regraft.families import families
families()
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
started = time.perf_counter()
try:
    main()
except SystemExit as exit_:
    code = exit_.code or 0
print(f"MEASURED {code} {peak() - before} {time.perf_counter() - started:.2f}", file=sys.stderr)
"""


def zeros_deflated(path: Path) -> None:
    """2 GB of zeros in 2 MB, in the shape of `torch.save`."""
    stream = io.BytesIO()
    torch.save(good(), stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as entry:
                for _ in range(32 if name.endswith("data.pkl") else 0):
                    entry.write(bytes(64 * MB))
                if not name.endswith("data.pkl"):
                    entry.write(old.read(name))


def many_tensors(path: Path, count: int = 1_000_000) -> None:
    entries = (f'"k{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(count))
    header = ("{" + ",".join(entries) + "}").encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + bytes(count))


def large_metadata(path: Path) -> None:
    save_file(good(), path, metadata={f"ss_{i}": "<b>x</b>" * (MB // 8) for i in range(40)})


def ten_gigabytes_of_zeros(path: Path) -> None:
    import pickle

    path.write_bytes(pickle.dumps({"a": Calls(bytearray, 10 << 30)}))


def nested_tuples(path: Path) -> None:
    path.write_bytes(_nested(200))


def one_number_as_a_terabyte(path: Path) -> None:
    torch.save({UP: torch.zeros(1).expand(1 << 38)}, path)


def views_of_one_storage(path: Path) -> None:
    storage = torch.zeros(MB)
    torch.save({f"{DOWN}{i}": storage.view(1024, 1024) for i in range(2000)}, path)


def holes(path: Path) -> None:
    size = 16 << 30
    header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("make", "name", "code", "memory"),
    [
        (zeros_deflated, "lora.pt", 1, 64 * MB),
        (ten_gigabytes_of_zeros, "lora.pt", 1, 64 * MB),
        (nested_tuples, "lora.pt", 1, 64 * MB),
        (one_number_as_a_terabyte, "lora.pt", 1, 64 * MB),
        (views_of_one_storage, "lora.pt", 1, 64 * MB),
        (holes, "lora.safetensors", 1, 64 * MB),
        (many_tensors, "lora.safetensors", 1, 64 * MB),
        (large_metadata, "lora.safetensors", 0, 400 * MB),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_bomb_takes_no_more_than_its_own_size(
    make: Callable[[Path], None], name: str, code: int, memory: int, tmp_path: Path
) -> None:
    make(tmp_path / name)
    for arguments in (["inspect", name], ["convert", name, "-o", "out.safetensors", "--format", "diffusers"]):
        if code == 0 and arguments[0] == "convert":
            continue
        ran = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        *lines, measured = ran.stderr.strip().splitlines()
        word, got, taken, seconds = measured.split()
        assert (word, int(got)) == ("MEASURED", code), ran.stderr
        assert len(lines) == code
        assert int(taken) < memory, f"{int(taken) / MB:.0f} MB"
        assert float(seconds) < 30
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("claimed", [1 << 20, 1 << 26])
def test_a_claim_costs_nothing_before_it_is_checked(claimed: int, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    entry = {"dtype": "F32", "shape": [claimed // 4], "data_offsets": [0, claimed]}
    header = json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    tracemalloc.start()
    with pytest.raises(RegraftError, match="truncated"):
        load_adapter(path)
    with pytest.raises(RegraftError, match="truncated"):
        open_base(path)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < MB


def test_50_000_prefixes_are_sorted_out_in_a_moment() -> None:
    wanted = [f"p{i}.model.layers.{i % 32}.mlp.down_proj" for i in range(50_000)]
    started = time.perf_counter()
    found = resolve_names(wanted, [f"model.layers.{i}.mlp.down_proj" for i in range(32)])
    assert time.perf_counter() - started < 10
    assert len(found) == 50_000


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*)*x", "(.*.*.*.*.*.*)z", "(a?){60}a{60}b"])
def test_a_pattern_that_explodes_elsewhere_takes_a_moment_here(pattern: str) -> None:
    started = time.perf_counter()
    assert not Pattern(rf"(.*\.)?({pattern})$").matches("a" * 59 + "!")
    assert time.perf_counter() - started < 2


def test_names_that_stand_for_a_trillion_are_refused() -> None:
    with pytest.raises(ValueError, match=r".+"):
        name_sets.expand(["{0-999999}.{0-999999}"])
