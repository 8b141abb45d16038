"""A quantised base takes part in a port as the plain one that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from regraft import open_base, port
from regraft.base import Base
from regraft.families import family_of_base
from toys import StateDict, deltas, llama, lora, relative_error, save_base

WIDTH, HEADS = 64, 4


def as_gguf(state: StateDict, path: Path) -> Path:
    """As llama.cpp's converter and quantiser write a Llama: matrices in Q8_0, query and key interleaved."""
    gguf = pytest.importorskip("gguf")
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    writer = gguf.GGUFWriter(path.with_suffix(".gguf"), "llama")
    writer.add_head_count(HEADS)
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if "q_proj" in name or "k_proj" in name:
            halves = tensor.reshape(HEADS, 2, WIDTH // HEADS // 2, WIDTH)
            tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        qtype = gguf.GGMLQuantizationType.Q8_0 if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.numpy(), qtype)
        writer.add_tensor(f"{name_map.get_name(module)}.{kind}", data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".gguf")


def as_scaled_fp8(state: StateDict, path: Path) -> Path:
    stored = {}
    for name, tensor in state.items():
        stored[name] = tensor
        if "_proj" in name:
            scale = tensor.abs().max() / 448
            stored |= {name: (tensor / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    return save_base(stored, path.with_suffix(".safetensors"))


def as_nf4(state: StateDict, path: Path) -> Path:
    bnb = pytest.importorskip("bitsandbytes")
    stored = {}
    for name, tensor in state.items():
        stored[name] = tensor
        if "_proj" in name:
            packed, how = bnb.functional.quantize_4bit(tensor, quant_type="nf4")
            stored |= {name: packed, **{f"{name}.{part}": t for part, t in how.as_dict(packed=True).items()}}
    return save_base(stored, path.with_suffix(".safetensors"))


@pytest.mark.parametrize(
    ("quantise", "error"), [(as_gguf, 0.01), (as_scaled_fp8, 0.04), (as_nf4, 0.12)], ids=["gguf", "fp8", "nf4"]
)
def test_the_quantised_form_of_a_base_takes_its_adapters(
    tmp_path: Path, quantise: Callable[[StateDict, Path], Path], error: float
) -> None:
    state = llama(width=WIDTH, mlp=96)
    plain = open_base(save_base(state, tmp_path / "plain.safetensors"))
    quantised = open_base(quantise(state, tmp_path / "quantised"))
    assert quantised.structure == plain.structure
    assert family_of_base(quantised) == family_of_base(plain)
    for ref in (name for name in plain.modules("model") if "_proj" in name):
        assert relative_error(weight(quantised, ref), weight(plain, ref)) < error
    adapter = lora(state)
    ported = port(adapter, plain, quantised, "procrustes").adapter
    for ref, delta in deltas(adapter).items():
        assert relative_error(deltas(ported)[ref], delta) < 2 * error
    copied = port(adapter, plain, quantised, "copy").adapter
    for ref, delta in deltas(adapter).items():
        assert torch.equal(deltas(copied)[ref], delta)


def weight(base: Base, path: str) -> torch.Tensor:
    return base.components["model"][f"{path}.weight"].load()
