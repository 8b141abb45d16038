"""Damage at random places: a reader says in one line what is wrong, or takes what it got; nothing else comes out."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from standard_vectors import vectors

from regraft import Settings, fit_migration, load_migration, open_base
from regraft.errors import RegraftError
from regraft.lineage import parse_lineage
from toys import drifted, llama, lora, permutation, regauged, rotation, save_base

LETTERS = '0123456789[]{},:"\\ntrufalsNI-.eE %'


def damaged(text: str, draw: random.Random) -> str:
    letters = list(text)
    for _ in range(draw.randint(1, 4)):
        letters[draw.randrange(len(letters))] = draw.choice(LETTERS)
    return "".join(letters)


def test_a_damaged_lineage_is_an_error_of_one_line() -> None:
    draw, read, lines = random.Random(1), 0, []
    texts = [json.dumps(vector["document"]) for vector in vectors("lineage") if "document" in vector]
    for _ in range(1500):
        try:
            parse_lineage(damaged(draw.choice(texts), draw))
            read += 1
        except RegraftError as error:
            lines.append(str(error))
    assert read < 750
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize("method", ["copy", "procrustes"])
def test_a_damaged_migration_is_an_error_or_ports_without_one(method: str, tmp_path: Path) -> None:
    state = llama(layers=1)
    moved = drifted(regauged(state, rotation(24, 3), permutation(40, 5)), 0.05)
    old = open_base(save_base(state, tmp_path / "old.safetensors"))
    new = open_base(save_base(moved, tmp_path / "new.safetensors"))
    data = fit_migration(old, new, method).save(tmp_path / "m.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    draw, file, ported, lines = random.Random(2), tmp_path / "x.safetensors", 0, []
    for _ in range(60):
        header = damaged(data[8 : 8 + size].decode(), draw).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
        try:
            load_migration(file).port(lora(state, roles=("q_proj",)), Settings(force=True, allow_partial=True))
            ported += 1
        except RegraftError as error:
            lines.append(str(error))
    assert 0 < ported < 60
    assert not any("\n" in line for line in lines)
