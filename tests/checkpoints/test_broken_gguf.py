"""Broken and hostile GGUF files: each is refused in one line that names the file, in bounded time and memory."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")

from regraft import RegraftError, open_base  # noqa: E402
from regraft.errors import InputError  # noqa: E402

U32, STRING, ARRAY = 4, 8, 9


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def tensor(name: bytes = b"x", dims: tuple[int, ...] = (2,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


HUGE = 2**62
CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "magic only": (b"GGUF", "truncated"),
    "no magic": (b"GGML" + header()[4:], "wrong magic"),
    "first version": (header(version=1), "GGUF version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "no tensors": (header(), "no tensors"),
    "countless tensors": (header(tensors=HUGE) + tensor(), "truncated"),
    "countless pairs": (header(pairs=HUGE), "truncated"),
    "endless key": (header(pairs=1) + struct.pack("<Q", HUGE) + bytes(64), "truncated"),
    "endless string": (header(pairs=1) + pair(b"a", STRING, struct.pack("<Q", HUGE)) + bytes(64), "truncated"),
    "endless array": (header(pairs=1) + pair(b"a", ARRAY, struct.pack("<IQ", U32, HUGE)) + bytes(64), "truncated"),
    "endless strings": (header(pairs=1) + pair(b"a", ARRAY, struct.pack("<IQ", STRING, HUGE)) + bytes(64), "truncated"),
    "array of arrays": (header(pairs=1) + pair(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1)) + bytes(64), "of type 9"),
    "unknown value": (header(pairs=1) + pair(b"a", 99, b"") + bytes(64), "unknown type 99"),
    "key in bad UTF-8": (header(pairs=1) + pair(b"\xff\xfe", U32, bytes(4)) + bytes(64), "not UTF-8"),
    "alignment 0": (header(1, 1) + pair(b"general.alignment", U32, bytes(4)) + tensor() + bytes(64), "alignment"),
    "alignment 48": (
        header(1, 1) + pair(b"general.alignment", U32, struct.pack("<I", 48)) + tensor() + bytes(64), "alignment"
    ),
    "many dimensions": (header(1) + tensor(dims=(1,) * 99) + bytes(64), "99 dimensions"),
    "huge dimension": (header(1) + tensor(dims=(HUGE, 0)) + bytes(64), "states a size of"),
    "huge product": (header(1) + tensor(dims=(100, 100, 100, 100)) + bytes(64), "outside of the file"),
    "offset beyond the end": (header(1) + tensor(offset=HUGE) + bytes(64), "outside of the file"),
    "unknown type": (header(1) + tensor(kind=77) + bytes(64), "type 77 is not known"),
    "part of a block": (header(1) + tensor(dims=(33,), kind=2) + bytes(64), "33 columns are no whole blocks of 32"),
    "name twice": (header(2) + tensor() + tensor() + bytes(64), "is there twice"),
    "endless name": (header(1) + tensor(name=b"x" * 5000) + bytes(64), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    content, words = CASES[case]
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        open_base(file)
    assert str(refused.value).startswith(str(file))
    assert "\n" not in str(refused.value)


def whole(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_tensor("blk.0.attn_q.weight", torch.ones(4, 32).numpy())
    writer.add_tensor("output_norm.weight", torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def flipped(content: bytes, seed: int) -> bytes:
    choose, changed = random.Random(seed), bytearray(content)
    for _ in range(choose.randint(1, 4)):
        # Most of the file is header.
        changed[choose.randrange(300)] = choose.choice([0, 1, 127, 128, 255, choose.randrange(256)])
    return bytes(changed)


@pytest.mark.parametrize("spoil", [lambda content, i: content[: i * 4], flipped], ids=["cut off", "flipped"])
def test_a_damaged_file_is_refused_or_read_but_never_crashes(
    tmp_path: Path, spoil: Callable[[bytes, int], bytes]
) -> None:
    content, refused = whole(tmp_path / "whole.gguf"), 0
    file = tmp_path / "m.gguf"
    for i in range(150):
        file.write_bytes(spoil(content, i))
        try:
            base = open_base(file)
            for ref in base.components["model"].values():
                ref.load()
        except RegraftError:
            refused += 1
    assert refused > 50


def test_without_the_gguf_package_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(tmp_path / "m.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(RegraftError, match=r"needs the gguf package\. Install it: pip install 'regraft\[gguf\]'"):
        open_base(tmp_path / "m.gguf")
