"""Quantised weights are shown as plain ones. Judges: bitsandbytes, and packers made from the formats' descriptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from regraft import InputError, open_base
from regraft.adapter import MODEL
from regraft.checkpoints._views import leaves
from regraft.tensors import TensorRef, read_rows

ROWS = [range(5, 9), range(0, 3), range(17, 99)]


def opened(tmp_path: Path, state: dict[str, Tensor], config: dict[str, Any] | None = None) -> tuple[TensorRef, str]:
    """The weight of module ``x`` as the base shows it, and the base's description; no stored tensor is forgotten."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    base = open_base(tmp_path if config is not None else tmp_path / "model.safetensors")
    shown = base.components[MODEL]
    assert {leaf.name for ref in shown.values() for leaf in leaves(ref)} | set(base.left_out) == set(state)
    assert set(shown) - {"x.bias", "plain.weight"} == {"x.weight"}
    return shown["x.weight"], base.description


def check(ref: TensorRef, wanted: Tensor) -> None:
    assert ref.shape == tuple(wanted.shape)
    assert ref.load().dtype == ref.dtype == torch.float32
    assert torch.equal(ref.load(), wanted)
    assert torch.equal(read_rows(ref, ROWS), torch.cat([wanted[part.start : part.stop] for part in ROWS]))


# ---- bitsandbytes


def linear4bit(kind: str, nested: bool, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(shape[1], shape[0], quant_type=kind, compress_statistics=nested)
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=nested)
    layer = layer.to("cpu")
    state = {f"x.{name}": tensor.clone() for name, tensor in layer.state_dict().items()}
    # As one row: on the CPU, bitsandbytes 0.50.2 mixes up the scales of rows that are no whole number of blocks.
    layer.weight.quant_state.shape = torch.Size([weight.numel()])
    whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return state, whole.reshape(shape)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(40, 96), (23, 33)], ids=str)
def test_4_bit_weights_are_those_that_bitsandbytes_computes_with(
    tmp_path: Path, kind: str, nested: bool, shape: tuple[int, int]
) -> None:
    state, wanted = linear4bit(kind, nested, shape)
    ref, description = opened(tmp_path, state)
    assert description == f"safetensors, bnb {kind}"
    check(ref, wanted)


def test_int8_weights_are_those_that_bitsandbytes_computes_with(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(48, 24, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(24, 48).half(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    state = {f"x.{name}": tensor.clone() for name, tensor in layer.state_dict().items()}
    ref, description = opened(tmp_path, state)
    assert description == "safetensors, bnb int8"
    judge = bnb.functional.int8_vectorwise_dequant(state["x.weight"], state["x.SCB"])
    torch.testing.assert_close(ref.load(), judge, rtol=1e-6, atol=0)
    check(ref, state["x.weight"].float() * (state["x.SCB"] / 127)[:, None])


# ---- GPTQ and AWQ, packed here bit by bit


def packed_down(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """(n, m) integers → (n · bits / 32, m) words; within a word the lowest bits hold the value at ``order[0]``."""
    each = 32 // bits
    order = order or tuple(range(each))
    words = []
    for start in range(0, len(values), each):
        word = [0] * values.shape[1]
        for place, source in enumerate(order):
            for column, value in enumerate(values[start + source].tolist()):
                word[column] |= value << (bits * place)
        words.append([number - 2**32 if number >= 2**31 else number for number in word])
    return torch.tensor(words, dtype=torch.int32)


def grid(bits: int, out: int, inputs: int, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers (out, in), zeros and scales (out, groups), and the weight that they stand for."""
    generator = torch.Generator().manual_seed(bits)
    count = int(groups.max()) + 1
    numbers = torch.randint(0, 2**bits, (out, inputs), generator=generator)
    zeros = torch.randint(0, 2**bits, (out, count), generator=generator)
    scales = torch.rand(out, count, generator=generator).half()
    weight = (numbers - zeros[:, groups]).float() * scales.float()[:, groups]
    return numbers, zeros, scales, weight


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["in order", "by activation", "without g_idx"])
def test_gptq_weights_are_what_was_packed(tmp_path: Path, bits: int, version: int, order: str) -> None:
    groups = torch.arange(64) // 16
    if order == "by activation":
        groups = groups[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    numbers, zeros, scales, weight = grid(bits, 32, 64, groups)
    stored_zeros = (zeros - 1) % 2**bits if version == 1 else zeros
    state = {
        "x.qweight": packed_down(numbers.T, bits),
        "x.qzeros": packed_down(stored_zeros, bits).T,
        "x.scales": scales.T,
        "x.bias": torch.ones(32),
        "plain.weight": torch.ones(2, 2),
    }
    if order != "without g_idx":
        state["x.g_idx"] = groups.int()
    settings = {"quant_method": "gptq", "checkpoint_format": "gptq_v2" if version == 2 else "gptq"}
    ref, description = opened(tmp_path, state, settings)
    assert description == f"safetensors, gptq int{bits}"
    check(ref, weight)


def test_awq_weights_are_what_was_packed(tmp_path: Path) -> None:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    numbers, zeros, scales, weight = grid(4, 24, 64, torch.arange(64) // 32)
    state = {
        "x.qweight": packed_down(numbers, 4, order).T,
        "x.qzeros": packed_down(zeros, 4, order).T,
        "x.scales": scales.T,
    }
    ref, description = opened(tmp_path, state, {"quant_method": "awq", "version": "gemm"})
    assert description == "safetensors, awq int4"
    check(ref, weight)


# ---- compressed-tensors


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "by activation"])
def test_compressed_tensors_weights_are_what_was_packed(tmp_path: Path, bits: int, kind: str) -> None:
    groups = torch.arange(40) // 10
    if kind == "by activation":
        groups = groups[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    # 21 rows and 40 columns are no whole words.
    numbers, zeros, scales, weight = grid(bits, 21, 40, groups)
    half = 2 ** (bits - 1)
    if kind != "asymmetric":
        weight = (numbers - half).float() * scales.float()[:, groups]
    padded = torch.nn.functional.pad(numbers, (0, -40 % (32 // bits)))
    state = {
        "x.weight_packed": packed_down(padded.T, bits).T,
        "x.weight_shape": torch.tensor([21, 40]),
        "x.weight_scale": scales,
    }
    if kind == "asymmetric":
        state["x.weight_zero_point"] = packed_down(torch.nn.functional.pad(zeros, (0, 0, 0, -21 % (32 // bits))), bits)
    if kind == "by activation":
        state["x.weight_g_idx"] = groups.int()
    ref, description = opened(tmp_path, state)
    assert description == f"safetensors, packed int{bits}"
    check(ref, weight)


# ---- 8 bits with scales


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("scale", ["comfy", "number", "rows", "column", "groups"])
def test_scaled_8_bit_weights_are_multiplied_by_their_scales(tmp_path: Path, dtype: torch.dtype, scale: str) -> None:
    torch.manual_seed(0)
    values = (torch.randn(24, 48) * 20).to(dtype)
    shape = {"comfy": (), "number": (1,), "rows": (24,), "column": (24, 1), "groups": (24, 4)}[scale]
    scales = torch.rand(shape)
    spread = scales.reshape(-1, 1) if scale != "groups" else scales.repeat_interleave(12, 1)
    name = "x.scale_weight" if scale == "comfy" else "x.weight_scale"
    state = {"x.weight": values, name: scales, "plain.weight": torch.ones(2, 2)}
    if scale == "comfy":
        state |= {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), "x.scale_input": torch.ones(())}
    else:
        state["x.input_scale"] = torch.ones(())
    ref, description = opened(tmp_path, state)
    assert description == f"safetensors, scaled {'int8' if dtype == torch.int8 else 'fp8'}"
    check(ref, values.float() * spread)


@pytest.mark.parametrize("block", [(128, 128), (16, 32)], ids=str)
def test_a_scale_for_each_block_covers_its_block(tmp_path: Path, block: tuple[int, int]) -> None:
    values = torch.randn(150, 200).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-150 // block[0]), -(-200 // block[1]))
    wanted = torch.empty(150, 200)
    for i in range(150):
        for j in range(200):
            wanted[i, j] = values[i, j].float() * scales[i // block[0], j // block[1]]
    state = {"x.weight": values, "x.weight_scale_inv": scales}
    settings = {"quant_method": "fp8", "weight_block_size": list(block)} if block != (128, 128) else None
    ref, _ = opened(tmp_path, state, settings)
    check(ref, wanted)


def test_int8_with_zero_points_is_shifted_before_it_is_scaled(tmp_path: Path) -> None:
    values = torch.randint(-128, 128, (24, 16)).to(torch.int8)
    scales, zeros = torch.rand(24, 1), torch.randint(-128, 128, (24, 1)).to(torch.int8)
    ref, _ = opened(tmp_path, {"x.weight": values, "x.weight_scale": scales, "x.weight_zero_point": zeros})
    check(ref, (values.float() - zeros.float()) * scales)


# ---- what is broken or unknown


def broken() -> dict[str, tuple[dict[str, Tensor], str]]:
    words = torch.zeros(4, 16, dtype=torch.int32)
    gptq = {"x.qweight": words, "x.qzeros": words[:2, :2], "x.scales": torch.ones(2, 16)}
    state = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1000000, 128]}'
    mark = "x.weight.quant_state.bitsandbytes__nf4"
    nf4 = {"x.weight": torch.zeros(32, 1, dtype=torch.uint8), "x.weight.absmax": torch.ones(1)}
    nf4 |= {"x.weight.quant_map": torch.ones(16), mark: torch.tensor(list(state), dtype=torch.uint8)}
    infinite = torch.tensor(list(b'{"shape": [1e400], "blocksize": 1}'), dtype=torch.uint8)
    int8 = {"x.weight": torch.zeros(4, 4, dtype=torch.int8), "x.SCB": torch.ones(4)}
    return {
        "no zeros": ({name: gptq[name] for name in ("x.qweight", "x.scales")}, "x.qzeros is missing"),
        "three bits": ({**gptq, "x.qweight": torch.zeros(3, 32, dtype=torch.int32)}, "not known"),
        "short g_idx": ({**gptq, "x.g_idx": torch.zeros(5, dtype=torch.int32)}, "g_idx"),
        "huge shape": (nf4, "do not fit together"),
        "no map": ({k: v for k, v in nf4.items() if "quant_map" not in k}, "quant_map is missing"),
        "no JSON": ({**nf4, mark: torch.ones(9, dtype=torch.uint8)}, "no description of a 4-bit weight"),
        "inf": ({**nf4, mark: infinite}, "no description"),
        "odd format": ({**int8, "x.weight_format": torch.tensor(2, dtype=torch.uint8)}, "GPU's own order"),
        "few rows": ({**int8, "x.SCB": torch.ones(3)}, "do not fit together"),
        "odd scales": (
            {"x.weight": torch.zeros(4, 4, dtype=torch.int8), "x.weight_scale": torch.ones(3, 1)},
            r"scales of shape \[3, 1\]",
        ),
        "nvfp4": ({"x.weight": torch.zeros(4, 4, dtype=torch.uint8), "x.weight_scale": torch.ones(4, 1)}, "NVFP4"),
        "packed": (
            {"x.weight_packed": words, "x.weight_scale": torch.ones(4, 1), "x.weight_shape": torch.tensor([4, 99])},
            "do not fit together",
        ),
    }


@pytest.mark.parametrize("case", broken())
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path: Path, case: str) -> None:
    state, words = broken()[case]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=words) as refused:
        open_base(tmp_path / "m.safetensors")
    assert str(tmp_path / "m.safetensors") in str(refused.value)


def test_a_group_that_does_not_exist_is_refused_when_the_weight_is_read(tmp_path: Path) -> None:
    words = torch.zeros(4, 16, dtype=torch.int32)
    state = {"x.qweight": words, "x.qzeros": words[:2, :2].clone(), "x.scales": torch.ones(2, 16)}
    save_file({**state, "x.g_idx": torch.full((32,), 7, dtype=torch.int32)}, tmp_path / "m.safetensors")
    ref = open_base(tmp_path / "m.safetensors").components[MODEL]["x.weight"]
    with pytest.raises(InputError, match=r"x\.g_idx: names a group that is none of 2"):
        ref.load()
