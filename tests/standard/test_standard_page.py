"""docs/standard.md says what is true: its examples are valid, its program ports, its fingerprints are regraft's."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from standard_vectors import migration_of, validator

from regraft import Settings, fit_migration, load_migration, open_base
from regraft.lineage import parse_lineage
from regraft.lineage.model import MOST_PORTS
from regraft.migrations.model import MOST_TERMS
from toys import drifted, llama, lora, permutation, regauged, relative_error, rotation, save_base

PAGE = (Path(__file__).parents[2] / "docs" / "standard.md").read_text(encoding="utf-8")


def blocks(info: str) -> list[str]:
    return re.findall(rf"```{info}\n(.*?)```", PAGE, re.DOTALL)


def test_the_lineage_of_the_page_is_valid() -> None:
    (text,) = blocks("json lineage")
    validator("lineage").validate(json.loads(text))
    assert parse_lineage(text)["ports"][0]["method"] == "procrustes"


def test_the_migration_of_the_page_is_valid(tmp_path: Path) -> None:
    (text,) = blocks("json migration")
    validator("migration").validate(json.loads(text))
    vector = {"document": json.loads(text), "tensors": {"map.0": {"dtype": "F16", "shape": [4, 4]}}}
    first, second = load_migration(migration_of(vector, tmp_path)).entries.values()
    assert first.transport.rotates
    assert (second.transport, second.uncovered) == (None, False)


@pytest.mark.parametrize("method", ["copy", "lora-x", "prolora", "procrustes"])
def test_the_program_of_the_page_ports_as_regraft_does(method: str, tmp_path: Path) -> None:
    state = llama(layers=2)
    moved = drifted(regauged(state, rotation(24, 3), permutation(40, 5)), 0.05)
    old = open_base(save_base(state, tmp_path / "old.safetensors"))
    new = open_base(save_base(moved, tmp_path / "new.safetensors"))
    migration = fit_migration(old, new, method)
    migration.save(tmp_path / "m.safetensors")
    lora(state, scale=1.0).save(tmp_path / "lora")
    (program,) = blocks("python port")
    names: dict[str, Any] = {}
    exec(compile(program, "docs/standard.md", "exec"), names)
    got = names["port"](str(tmp_path / "lora" / "adapter_model.safetensors"), str(tmp_path / "m.safetensors"))
    # All terms, so that no rank is cut.
    ranks = {"prolora": 8}
    wanted = migration.port(lora(state, scale=1.0), Settings(force=True, rank=ranks.get(method))).adapter
    assert len(got) == 2 * len(wanted.updates)
    for ref, update in wanted.updates.items():
        a, b = (got[f"base_model.model.{ref.path}.lora_{which}.weight"] for which in "AB")
        assert relative_error(b @ a, update.delta()) < 1e-5


def test_a_fingerprint_by_the_rules_of_the_page_is_regrafts(tmp_path: Path) -> None:
    """Written from rules 1 to 8 alone, with hashlib and indices into bytes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "text_model.layer.weight": torch.randn(40, 24, generator=generator).half(),
        "conv.weight": torch.randn(6, 5, 1, 1, generator=generator),
        "conv3.weight": torch.randn(6, 5, 3, 3, generator=generator).bfloat16(),
        "norm.bias": torch.randn(17, generator=generator),
        "scale": torch.tensor(2.0),
        "position_ids": torch.arange(7),
    }
    file = tmp_path / "base.safetensors"
    save_file(tensors, file)
    kinds = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}
    lines, sampled, whole = b"", b"", b""
    named = {name.removeprefix("text_model."): t for name, t in load_file(file).items() if t.dtype in kinds}
    for name in sorted(named, key=str.encode):
        tensor = named[name]
        shape = list(tensor.shape)
        if len(shape) > 2 and torch.Size(shape[2:]).numel() == 1:
            shape = shape[:2]
        line = f"{name}\t{'x'.join(map(str, shape))}\n".encode()
        raw, size, count = (
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
            tensor.itemsize,
            tensor.numel(),
        )
        n = 32 if tensor.dim() >= 2 else 8
        sample = raw
        if count > n:
            run = n // 4
            starts = [((2 * j + 1) * 2654435769 % 2**32) * (count - run + 1) // 2**32 for j in range(4)]
            sample = b"".join(raw[start * size : (start + run) * size] for start in starts)
        lines += line
        sampled += line + f"{kinds[tensor.dtype]}\n".encode() + sample
        whole += line + f"{kinds[tensor.dtype]}\n".encode() + hashlib.sha256(raw).digest()

    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    def joined(hash_: str) -> str:
        return digest(f"model\t{hash_}\n".encode())

    base = open_base(file)
    part = base.exact_prints().components["model"]
    assert (part.structure, part.sample, part.content) == (digest(lines), digest(sampled), digest(whole))
    assert base.fingerprint == f"v1:{joined(digest(sampled))[:24]}-{joined(digest(lines))[:8]}"
    assert base.structure == joined(digest(lines))


def test_the_limits_of_the_page_are_those_of_the_code() -> None:
    assert f"{MOST_PORTS} ports" in PAGE
    assert f"{MOST_TERMS} terms" in PAGE
