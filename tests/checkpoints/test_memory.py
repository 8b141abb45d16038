"""One tensor of a large file is read in about its own size; the rest stays on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import regraft

# Modules of a made-up model; each weight is (OUT, IN): 32 MB in float32.
MODULES, OUT, IN = 6, 2048, 4096
WEIGHT = OUT * IN * 4

READ = """
import sys
from regraft import open_base
from regraft.tensors import read_rows

def peak(read):
    # VmHWM is this process's own, whatever forked it; writing 5 sets it back to what is held now.
    open("/proc/self/clear_refs", "w").write("5")
    held = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
    before = held()
    read()
    return held() - before

refs = list(open_base(sys.argv[1]).components["model"].values())
assert refs[2].shape == (2048, 4096)
# Once before, for what the libraries set up at first use.
read_rows(refs[0], [range(4)])
print(peak(lambda: read_rows(refs[1], [range(16)])), peak(lambda: refs[2].load()))
"""


def peaks(file: Path) -> tuple[int, int]:
    """Bytes by which a fresh process grows at most while it reads 16 rows, and a whole weight."""
    environment = os.environ | {"PYTHONPATH": str(Path(regraft.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, whole = map(int, done.stdout.split())
    return rows, whole


def made(kind: str, folder: Path) -> Path:
    file = folder / f"{kind}.safetensors"
    if kind == "gguf":
        gguf = pytest.importorskip("gguf")
        qtype = gguf.GGMLQuantizationType.Q8_0
        writer = gguf.GGUFWriter(folder / "m.gguf", "made-up")
        data = gguf.quants.quantize(torch.randn(OUT, IN).numpy(), qtype)
        for i in range(MODULES):
            writer.add_tensor(f"{i}.weight", data, raw_dtype=qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "m.gguf"
    state = {}
    for i in range(MODULES):
        if kind == "plain":
            state[f"{i}.weight"] = torch.ones(OUT, IN)
        elif kind == "fp8":
            state |= {f"{i}.weight": torch.ones(OUT, IN).to(torch.float8_e4m3fn), f"{i}.scale_weight": torch.ones(())}
        elif kind == "gptq":
            state[f"{i}.qweight"] = torch.zeros(IN // 8, OUT, dtype=torch.int32)
            state[f"{i}.qzeros"] = torch.zeros(IN // 128, OUT // 8, dtype=torch.int32)
            state[f"{i}.scales"] = torch.ones(IN // 128, OUT).half()
        else:
            note = {"blocksize": 64, "shape": [OUT, IN]}
            state[f"{i}.weight"] = torch.zeros(OUT * IN // 2, 1, dtype=torch.uint8)
            state[f"{i}.weight.absmax"] = torch.ones(OUT * IN // 64)
            state[f"{i}.weight.quant_map"] = torch.ones(16)
            text = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
            state[f"{i}.weight.quant_state.bitsandbytes__nf4"] = text
    save_file(state, file)
    return file


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "gguf", "fp8", "nf4", "gptq"])
def test_reading_one_weight_takes_about_its_size(tmp_path: Path, kind: str) -> None:
    file = made(kind, tmp_path)
    # Packed words beside the weight are an eighth or a quarter of it; indices go chunk by chunk.
    rows, whole = peaks(file)
    assert 0.9 * WEIGHT < whole < 1.5 * WEIGHT
    assert rows < 0.4 * WEIGHT
