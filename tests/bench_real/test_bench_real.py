"""The benchmark's own parts, without a package and without a download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")

from tools.bench_real import minilm, results, tables

from regraft.bench import encoders, protein, rated


def test_an_epoch_visits_each_text_once() -> None:
    seen = [i for batch in encoders.batches(["x" * n for n in range(300)], 1, seed=0) for i in batch]
    assert sorted(seen) == list(range(300))


def test_a_text_is_never_in_training_and_test(tmp_path: Path) -> None:
    lines = [f"{i}\t{(-1) ** i * (1 + i % 3)}\ttext {i % 40}" for i in range(60)]
    (tmp_path / rated.FILES["film"]).write_text("\n".join([*lines, "60\t0.5\tundecided"]), encoding="utf-8")
    train, test = rated.load_task(tmp_path, "film", 0, 30, 10)
    assert not set(train.texts) & set(test.texts)
    assert len(train.texts) == 30
    assert "undecided" not in train.texts + test.texts


def test_the_best_head_separates_what_can_be_separated() -> None:
    features = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    labels = (features[:, 2] > 1).float()
    assert encoders.accuracy(encoders.best_head(features, labels), features, labels) > 0.97


def test_the_random_control_has_the_norms_of_the_adapter(tmp_path: Path) -> None:
    lora = protein.Lora({"layer": (torch.randn(4, 16), torch.randn(8, 4))})
    minilm.random_like(lora.save(tmp_path / "lora"), tmp_path / "random", seed=0)
    a, b = protein.load_lora(tmp_path / "random").pairs["layer"]
    assert float((b @ a).norm()) == pytest.approx(float((lora.pairs["layer"][1] @ lora.pairs["layer"][0]).norm()))
    assert not torch.equal(a, lora.pairs["layer"][0])


def test_alpha_patterns_of_a_port_count_when_a_lora_is_read_back(tmp_path: Path) -> None:
    import json

    lora = protein.Lora({"net.1": (torch.ones(2, 3), torch.ones(3, 2)), "net.12": (torch.ones(2, 3), torch.ones(3, 2))})
    config = lora.save(tmp_path) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alpha_pattern": {"^net.1": 4}}))
    read = protein.load_lora(tmp_path).pairs
    assert float(read["net.1"][1][0, 0]) == 2.0
    assert float(read["net.12"][1][0, 0]) == 1.0


def test_made_up_receptors_are_the_same_for_the_same_seed() -> None:
    inputs, hydropathy = protein.receptors(8, 3)
    again, _ = protein.receptors(8, 3)
    assert torch.equal(inputs, again)
    assert inputs[:, 0].tolist() == [[2, 0, 0, 0]] * 8
    assert float(hydropathy.mean()) == pytest.approx(0.0, abs=1e-5)


def test_a_lora_that_is_zero_changes_no_output() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(0)
    model = protein.Protein(16, 2).eval()
    inputs, _ = protein.receptors(4, 0)
    lora = protein.new_lora(model, [0, 1], 4, seed=0)
    assert torch.equal(protein.outputs(model, inputs), protein.outputs(model, inputs, lora))


def test_spread_leaves_out_what_is_undefined() -> None:
    assert results.spread([1.0, None, 3.0]) == {"mean": 2.0, "std": 1.4142, "n": 2}
    assert results.spread([None]) is None


def test_the_page_is_what_the_tables_command_writes() -> None:
    root = Path(__file__).parents[2]
    if not list((root / "results").glob("real-*.json")):
        pytest.skip("no results in this checkout")
    assert (root / "docs" / "measured.md").read_text(encoding="utf-8") == tables.page(root / "results")


def test_saved_loras_have_the_keys_that_peft_writes(tmp_path: Path) -> None:
    protein.Lora({"a.b": (torch.ones(2, 3), torch.ones(3, 2))}).save(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {"base_model.model.a.b.lora_A.weight", "base_model.model.a.b.lora_B.weight"}
