"""PyTorch files with damaged bytes: each is read, or told as an error of ours; none gives a traceback."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from regraft.errors import RegraftError
from regraft.tensor_files import read_torch

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(2, 2, dtype=torch.float16)}


def flipped(data: bytes, dice: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(dice.randint(1, 12)):
        out[dice.randrange(len(out))] = dice.randrange(256)
    return bytes(out)


def in_the_pickle(data: bytes, dice: random.Random) -> bytes:
    """Damage where the unpickler reads: in a zip archive it begins behind the first name."""
    start = data.find(b"\x80\x02")
    out = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        out[start + dice.randrange(200)] = dice.randrange(256)
    return bytes(out)


def cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def spliced(data: bytes, dice: random.Random) -> bytes:
    at, to = dice.randrange(len(data)), dice.randrange(len(data))
    return data[:at] + data[to : to + dice.randrange(60)] + data[at:]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("mutate", [flipped, in_the_pickle, cut, spliced], ids=lambda f: f.__name__)
def test_a_damaged_file_is_read_or_told(
    tmp_path: Path, mutate: Callable[[bytes, random.Random], bytes], zipped: bool
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    assert set(read_torch(path).tensors) == set(STATE)
    told: list[str] = []
    for seed in range(50):
        path.write_bytes(mutate(data, random.Random(seed)))
        try:
            for ref in read_torch(path).tensors.values():
                ref.load()
        except RegraftError as error:
            told.append(str(error))
    assert told
    assert all(str(path) in line for line in told)
