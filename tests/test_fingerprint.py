"""The fingerprint: exact where it says so, and the same weights known again in another dtype."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from regraft import InputError, open_base
from regraft.base import Base
from regraft.fingerprint import Fingerprint, fingerprint_component, parse_brief
from regraft.likeness import Likeness, by_component, compare_components, compare_fingerprints, compare_sketches
from regraft.sketch import Sketch, sample_runs
from regraft.tensors import InMemory, TensorRef, Transposed, read_elements
from toys import StateDict, drifted, llama, save_base

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}


def print_of(state: StateDict) -> Any:
    return fingerprint_component({name: InMemory(tensor) for name, tensor in state.items()})


def cast(state: StateDict, dtype: torch.dtype) -> StateDict:
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def model(seed: int = 0) -> StateDict:
    return llama(seed, layers=6, width=64, mlp=96)


def true_drift(old: StateDict, new: StateDict) -> float:
    moved = sum(float((new[name].double() - old[name].double()).square().sum()) for name in old)
    return (moved / sum(float(old[name].double().square().sum()) for name in old)) ** 0.5


def by_the_specification(state: StateDict) -> dict[str, Any]:
    """Structure, sample, content and sketch data by the numbered rules, from numpy arrays alone."""
    structure, sample, content, data = hashlib.sha256(), hashlib.sha256(), hashlib.sha256(), b""
    for name in sorted(state, key=str.encode):
        array = state[name].numpy()
        dims = array.shape[:2] if array.ndim > 2 and int(np.prod(array.shape[2:])) == 1 else array.shape
        line = f"{name}\t{'x'.join(map(str, dims))}\n".encode()
        flat, kind = array.reshape(-1), {"float32": "F32", "float16": "F16"}[str(array.dtype)]
        n = 32 if len(dims) >= 2 else 8
        if flat.size > n:
            q = n // 4
            starts = [(((2 * j + 1) * 2654435769) % 2**32) * (flat.size - q + 1) // 2**32 for j in range(4)]
            taken = np.concatenate([flat[s : s + q] for s in starts])
        else:
            taken = flat
        structure.update(line)
        sample.update(line + f"{kind}\n".encode() + taken.tobytes())
        content.update(line + f"{kind}\n".encode() + hashlib.sha256(flat.tobytes()).digest())
        largest = np.abs(taken).max(initial=0)
        e = int(np.floor(np.log2(largest))) if largest > 0 else 0
        halves = (taken.astype(np.float64) * 2.0**-e).astype(np.float16)
        head = struct.pack(
            "<6sBBhQ", hashlib.sha256(line).digest()[:6], ["F16", "F32"].index(kind), n_of(taken), e, flat.size
        )
        data += head + halves.tobytes()
    hashes = {"structure": structure.hexdigest(), "sample": sample.hexdigest(), "content": content.hexdigest()}
    return {
        **hashes,
        "sketch": {"tensors": len(state), "kinds": ["F16", "F32"], "data": base64.b64encode(data).decode()},
    }


def n_of(taken: np.ndarray) -> int:
    return len(taken)


def test_every_hash_is_what_the_specification_says(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    state = {
        "b.weight": torch.randn(40, 30, generator=generator) * 1e-6,
        "a.conv.weight": torch.randn(20, 16, 1, 1, generator=generator).half(),
        "a.conv3.weight": torch.randn(6, 4, 3, 3, generator=generator),
        "é.bias": torch.randn(9, generator=generator) * 1e6,
        "small": torch.randn(2, 3, generator=generator),
        "zero.bias": torch.zeros(12).half(),
        "scalar": torch.tensor(1.5),
    }
    wanted = by_the_specification(state)
    buffers = {"position_ids": torch.arange(5), "mask": torch.ones(3, dtype=torch.bool)}
    base = open_base(save_base({**state, **buffers}, tmp_path / "m.safetensors"))
    found = base.exact_prints().to_json()
    assert found == {"version": 1, "components": {"model": wanted}}
    lines = {part: f"model\t{wanted[part]}\n".encode() for part in ("sample", "structure")}
    digests = {part: hashlib.sha256(line).hexdigest() for part, line in lines.items()}
    assert base.fingerprint == f"v1:{digests['sample'][:24]}-{digests['structure'][:8]}"
    assert base.structure == digests["structure"]


def test_text_encoders_are_the_same_with_and_without_their_text_model_level() -> None:
    state = {"text_model.encoder.layers.0.fc1.weight": torch.ones(9, 9), "text_projection.weight": torch.ones(3, 3)}
    short = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    assert print_of(state).sample == print_of(short).sample
    both = {**state, **short}
    assert len(print_of(both).sketch.samples) == 3


@pytest.mark.parametrize("first", ["fp32", *DTYPES])
@pytest.mark.parametrize("second", DTYPES)
def test_the_same_weights_are_known_again_in_any_dtype(first: str, second: str) -> None:
    state = model()
    old, new = (cast(state, DTYPES.get(name, torch.float32)) for name in (first, second))
    found = compare_components(print_of(old), print_of(new))
    assert found.verdict == ("identical" if first == second else "same")
    assert print_of(old).structure == print_of(new).structure
    assert found.drift is not None
    assert found.floor is not None
    assert found.drift <= 1.5 * found.floor


@pytest.mark.parametrize("amount", [0.002, 0.05, 0.5])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_another_version_is_told_from_a_cast_however_light_its_training(amount: float, dtype: str) -> None:
    state = model()
    found = compare_components(print_of(state), print_of(cast(drifted(state, amount), DTYPES[dtype])))
    assert found.verdict == "drifted"


def test_one_changed_module_is_seen_and_its_share_is_told() -> None:
    state = model()
    changed = {**state, "lm_head.weight": drifted(state, 0.3)["lm_head.weight"]}
    found = compare_components(print_of(state), print_of(cast(changed, torch.float16)))
    assert found.verdict == "drifted"
    assert found.touched == pytest.approx(state["lm_head.weight"].numel() / sum(t.numel() for t in state.values()))


def test_weights_trained_from_another_start_are_unrelated() -> None:
    found = compare_components(print_of(model(0)), print_of(model(1)))
    assert found.verdict == "unrelated"
    assert "unrelated" in str(found)


def test_the_drift_estimate_is_as_good_as_its_error_says() -> None:
    misses, errors = [], []
    for seed in range(12):
        old = model(seed)
        new = drifted(old, 0.1, seed + 100)
        found = compare_components(print_of(old), print_of(new))
        assert found.drift is not None
        assert found.error is not None
        misses.append((found.drift - true_drift(old, new)) / found.error)
        errors.append(found.error / found.drift)
    assert sum(abs(miss) > 2 for miss in misses) <= 2
    assert 0.3 < float(np.std(misses)) < 2.0
    assert max(errors) < 0.05


def test_a_quantised_model_is_known_again_and_a_drifted_one_is_not() -> None:
    gguf = pytest.importorskip("gguf")

    class Quantised:
        """A tensor as a reader of quantised files shows it."""

        dtype = torch.float32

        def __init__(self, tensor: torch.Tensor, kind: str) -> None:
            self.shape, self.kind = tuple(tensor.shape), kind
            packed = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType[kind])
            self.values = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]))

        def load(self) -> torch.Tensor:
            return self.values

    def quantised(state: StateDict, kind: str) -> Any:
        refs: dict[str, TensorRef] = {n: Quantised(t, kind) if t.dim() > 1 else InMemory(t) for n, t in state.items()}
        return fingerprint_component(refs, content=True)

    state = model()
    for kind in ("Q8_0", "Q5_1", "Q4_0"):
        part = quantised(state, kind)
        assert compare_components(print_of(cast(state, torch.float16)), part).verdict == "same", kind
        assert compare_components(print_of(drifted(state, 0.3)), part).verdict == "drifted", kind
        assert part.content is None
        assert sorted(part.sketch.to_json()["kinds"]) == ["F32", kind.lower()]


def test_the_json_form_comes_back_and_still_compares(tmp_path: Path) -> None:
    state = model()
    base = open_base(save_base(state, tmp_path / "m.safetensors"))
    again = Fingerprint.from_json(json.loads(json.dumps(base.prints.to_json())))
    assert again.to_json() == base.prints.to_json()
    assert str(again) == base.fingerprint
    half = open_base(save_base(cast(state, torch.float16), tmp_path / "half.safetensors"))
    assert compare_fingerprints(again, half.prints)["model"].verdict == "same"
    bare = Fingerprint.from_json(base.prints.to_json(sketch=False))
    assert compare_fingerprints(bare, half.prints)["model"] == Likeness("other", "structure", overlap=1.0)
    assert compare_fingerprints(bare, base.prints)["model"].verdict == "identical"


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2, "components": {}},
        {"version": 1},
        [],
        {"version": 1, "components": {"unet": {"structure": "ab", "sample": "cd"}}},
        {"version": 1, "components": {"unet": {"structure": "a" * 64, "sample": "b" * 64, "sketch": {"data": "!"}}}},
        {
            "version": 1,
            "components": {
                "unet": {
                    "structure": "a" * 64,
                    "sample": "b" * 64,
                    "sketch": {"tensors": 1, "kinds": ["F16"], "data": base64.b64encode(b"x" * 20).decode()},
                }
            },
        },
    ],
)
def test_a_damaged_fingerprint_is_an_input_error(damage: Any) -> None:
    with pytest.raises(InputError, match="fingerprint"):
        Fingerprint.from_json(damage)


def test_the_brief_sketch_is_a_short_line_that_still_estimates_the_drift() -> None:
    state = model()
    text = Fingerprint({"text": print_of({"a.weight": torch.ones(4, 9)}), "unet": print_of(state)}).brief()
    assert text is not None
    assert len(text) <= 4096
    component, sketch = parse_brief(text)
    assert (component, len(sketch.samples)) == ("unet", 32)
    new = drifted(state, 0.2)
    found = compare_sketches(sketch, print_of(new).sketch)
    assert (found.drift, found.overlap) == (pytest.approx(true_drift(state, new), rel=0.15), 1.0)
    assert compare_sketches(sketch, print_of(cast(state, torch.bfloat16)).sketch).verdict == "same"
    with pytest.raises(ValueError, match="version"):
        parse_brief(text.replace("s1:", "s9:"))


def test_a_model_alone_is_found_within_a_pipeline(tmp_path: Path) -> None:
    unet, text = model(), {"encoder.weight": torch.randn(20, 20)}
    pipeline = Fingerprint({"unet": print_of(unet), "text_encoder": print_of(text)})
    alone = Fingerprint({"model": print_of(cast(unet, torch.float16))})
    assert compare_fingerprints(alone, pipeline)["model"].verdict == "same"
    found = compare_fingerprints(pipeline, alone)
    assert {name: likeness.verdict for name, likeness in found.items()} == {"unet": "same"}
    assert by_component(found).startswith("unet: the same weights")
    assert by_component({}) == "nothing in common"


def test_nan_and_inf_do_not_break_the_comparison() -> None:
    state = model()
    broken = {**state, "lm_head.weight": torch.full_like(state["lm_head.weight"], float("nan"))}
    assert compare_components(print_of(broken), print_of(cast(broken, torch.float16))).verdict == "same"
    assert compare_components(print_of(state), print_of(broken)).verdict == "drifted"
    assert Sketch.from_json(print_of(broken).sketch.to_json()).to_json() == print_of(broken).sketch.to_json()


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (7,), (8,), (9,), (31, 1), (33, 1), (5, 8, 3, 3), (1280, 1280)])
def test_runs_lie_inside_of_the_tensor_and_are_read_alike_from_disk_and_memory(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    runs = [run for run in sample_runs(shape) if len(run)]
    assert all(0 <= run.start < run.stop <= tensor.numel() for run in runs)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    wanted = torch.tensor([float(i) for run in runs for i in run])
    refs: list[TensorRef] = [open_base(tmp_path / "x.safetensors").components["model"]["x"], InMemory(tensor)]
    if len(shape) == 2:
        refs.append(Transposed(InMemory(tensor.T)))
    for ref in refs:
        got = read_elements(ref, runs) if runs else torch.empty(0)
        assert torch.equal(got, wanted)


def test_the_fingerprint_reads_a_small_part_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    from regraft.tensors import Stored

    plain = Stored._read

    def counted(self: Stored, parts: Any) -> torch.Tensor:
        nonlocal read
        read += sum(size for _, size in parts)
        return plain(self, parts)

    monkeypatch.setattr(Stored, "_read", counted)
    path = save_base({f"layers.{i}.weight": torch.ones(256, 256) for i in range(20)}, tmp_path / "m.safetensors")
    base: Base = open_base(path)
    assert base.fingerprint
    assert read == 20 * 32 * 4
    assert base.exact_prints().components["model"].content
    assert read == 2 * 20 * 32 * 4 + 20 * 256 * 256 * 4
