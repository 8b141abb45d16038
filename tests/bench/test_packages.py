"""The parts of the real pairs that need no package: ONNX weights, heads, scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("peft")

from regraft.bench import protein
from regraft.bench.onnx_file import named_weights, read_onnx
from regraft.bench.packages import PackagesWorld
from regraft.bench.sentiment import cosines, held_out
from regraft.errors import InputError


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, value: np.ndarray) -> bytes:
    kind = {"float32": 1, "int8": 3}[str(value.dtype)]
    dims = b"".join(field(1, size) for size in value.shape)
    return field(5, dims + field(2, kind) + field(8, name.encode()) + field(9, value.tobytes()))


def node(kind: str, inputs: tuple[str, ...], output: str) -> bytes:
    names = b"".join(field(1, name.encode()) for name in inputs)
    return field(1, names + field(2, output.encode()) + field(4, kind.encode()))


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    """A plain layer, and one quantised per output channel, as exporters write them."""
    generator = np.random.default_rng(0)
    plain, bias = generator.normal(size=(3, 5)).astype("float32"), np.ones(5, "float32")
    whole, scale = generator.integers(-127, 127, size=(3, 4)).astype("int8"), np.array([1, 2, 3, 4], "float32")
    graph = tensor("onnx::MatMul_7", plain) + tensor("a.bias", bias)
    graph += node("MatMul", ("x", "onnx::MatMul_7"), "y") + node("Add", ("a.bias", "y"), "z")
    graph += tensor("val_q", whole) + tensor("val_scale", scale) + tensor("b.bias", np.ones(4, "float32"))
    graph += node("Cast", ("val_q",), "val_f") + node("Mul", ("val_f", "val_scale"), "val")
    graph += node("MatMul", ("z", "val"), "u") + node("Add", ("u", "b.bias"), "v")
    file = tmp_path / "model.onnx"
    file.write_bytes(field(1, 9) + field(7, graph))
    np.savez(tmp_path / "truth.npz", plain=plain, dense=whole * scale)
    return file


def test_matrices_get_their_modules_names_and_torchs_shape(onnx: Path) -> None:
    truth = np.load(onnx.parent / "truth.npz")
    found = named_weights(read_onnx(onnx))
    assert sorted(found) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    assert np.array_equal(found["a.weight"].numpy(), truth["plain"].T)
    assert np.array_equal(found["b.weight"].numpy(), truth["dense"].T)


def test_a_file_that_is_cut_off_is_told(onnx: Path) -> None:
    data = onnx.read_bytes()
    for size in (1, len(data) // 2, len(data) - 1):
        onnx.write_bytes(data[:size])
        with pytest.raises(InputError, match="no whole ONNX file"):
            read_onnx(onnx)


def test_no_head_sees_the_text_that_it_is_scored_on() -> None:
    # Labels that have nothing to do with the vectors can't be told, however well a head fits them.
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(200, 150, generator=generator)
    labels = (torch.rand(200, generator=generator) > 0.5).float()
    losses, right = held_out(vectors, labels)
    assert abs(right.mean() - 0.5) < 0.12
    assert losses.mean() > 0.6


def test_what_the_vectors_hold_is_found() -> None:
    vectors = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    losses, right = held_out(vectors, (vectors[:, 3] > 0).float())
    # Weight decay keeps the head from being as steep as the labels are.
    assert right.mean() > 0.9
    assert losses.mean() < 0.6


def test_cosines_do_not_feel_length_or_rotation() -> None:
    vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    assert np.allclose(cosines(vectors), cosines(3 * vectors @ turn), atol=1e-6)


def test_properties_are_standardised_and_differ() -> None:
    rows, hydropathy = protein.receptors(64, 0)
    same, volume = protein.receptors(64, 0, "volume")
    assert torch.equal(rows, same)
    assert float(volume.std()) == pytest.approx(1.0, abs=1e-5)
    assert abs(float(torch.corrcoef(torch.stack([hydropathy, volume]))[0, 1])) < 0.8


def test_every_pair_has_three_adapters_and_a_name_of_its_own(tmp_path: Path) -> None:
    pairs = PackagesWorld(tmp_path).pairs
    assert len({pair.name for pair in pairs}) == len(pairs) == 6
    assert all(len(pair.adapters) >= 3 for pair in pairs)
    assert not any(tmp_path.iterdir()), "listing pairs must fetch nothing"
