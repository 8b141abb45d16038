"""Folders of AdapterHub's library are read, run and written as it does; other kinds are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Run
from safetensors.torch import load_file
from torch import Tensor

from regraft import InputError
from regraft.refine.bottleneck import BottleneckResult, load_bottlenecks
from regraft.refine.bottleneck.layers import placed
from regraft.runtime import load_model
from regraft.tensor_files import read_tensor_file
from verify.hub import HUB, Small, hooked, saved, trained


@pytest.fixture(scope="module")
def smalls(old: Path) -> list[Small]:
    return trained(old)


@pytest.fixture(scope="module")
def words(smalls: list[Small], folder: Path) -> Path:
    return saved(smalls, folder / "words")


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("houlsby", "bert"),
        ("own-norms", "bert"),
        ("post-add", "distilbert"),
        ("pfeiffer", "llama"),
        ("plus", "llama"),
        ("left-out", "gpt2"),
    ],
)
def test_a_model_says_with_it_what_the_library_s_own_says(name: str, base: str, tmp_path: Path) -> None:
    model, bottlenecks = load_model(HUB / base), load_bottlenecks(HUB / name)
    wanted = load_file(HUB / name / "expected.safetensors")["outputs"]
    ids = torch.tensor([[3, 7, 5, 9, 2, 11, 4], [8, 1, 23, 6, 6, 10, 0]])

    def said() -> Tensor:
        with torch.no_grad():
            outputs = model.main(input_ids=ids)
        return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state

    before = said()
    with placed(model, bottlenecks.modules()):
        torch.testing.assert_close(said(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(said(), before)
    assert not torch.allclose(before, wanted, atol=0.1)
    # And what was read is written.
    BottleneckResult(bottlenecks, None).save(tmp_path / "again")  # type: ignore[arg-type]
    again, config = load_bottlenecks(tmp_path / "again"), "adapter_config.json"
    assert json.loads((tmp_path / "again" / config).read_text()) == json.loads((HUB / name / config).read_text())
    keys = [sorted(read_tensor_file(next(folder.glob("*adapter.*"))).tensors) for folder in (HUB / name, again.path)]
    assert keys[0] == keys[1]


def test_its_forward_is_the_formula(old: Path, smalls: list[Small], words: Path) -> None:
    model, ids = load_model(old), torch.randint(3, 48, (4, 12))
    with hooked(model.main, smalls), torch.no_grad():
        wanted = model.main(input_ids=ids).logits
    with placed(model, load_bottlenecks(words).modules()), torch.no_grad():
        assert torch.equal(model.main(input_ids=ids).logits, wanted)


@pytest.mark.parametrize(
    ("head", "what"),
    [
        ({"config": {"head_type": "tagging"}}, "kept as it is"),
        ({"config": None, "model_class": "LlamaForCausalLM"}, "left out: the new base has one"),
    ],
)
def test_the_command_reads_and_writes_the_library_s_folder(
    words: Path, old: Path, drifted: Path, tmp_path: Path, run: Run, head: dict[str, Any], what: str
) -> None:
    shutil.copytree(words, tmp_path / "words")
    (tmp_path / "words" / "head_config.json").write_text(json.dumps(head))
    ran = run(
        "refine", tmp_path / "words", "--from", old, "--to", drifted, "-o", tmp_path / "out", "--steps", "4", "--json"
    )
    assert ran.code == 0, ran.err
    kept = {"head_config.json"} if what == "kept as it is" else set()
    assert {Path(file).name for file in ran.record["outputs"]} == {
        "adapter_config.json",
        "pytorch_adapter.bin",
        *kept,
    }
    assert what in ran.record["untrained"]["prediction head"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"is_parallel": True}, "of the parallel kind, which is not read"),
        ({"phm_layer": True}, "of the Compacter kind, which is not read"),
        ({"use_gating": True}, "of the gated kind, which is not read"),
        ({"architecture": "prompt_tuning"}, "of the kind prompt_tuning, which is not read"),
        ({"architecture": "lora"}, "of the kind lora, which is not read"),
        ({"ln_before": True}, "has no adapter_down.1.weight"),
        ({"scaling": "channel"}, "does not fit its configuration"),
        ({"non_linearity": "wobble"}, "names an activation that isn't known here"),
        ({"residual_before_ln": "maybe"}, "damaged adapter_config.json"),
    ],
)
def test_other_kinds_are_told_in_a_line(
    smalls: list[Small], old: Path, drifted: Path, tmp_path: Path, run: Run, options: dict[str, Any], said: str
) -> None:
    folder = saved(smalls, tmp_path / "odd", **options)
    ran = run("refine", folder, "--from", old, "--to", drifted, "-o", tmp_path / "out")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert said in ran.err
    assert not (tmp_path / "out").exists()


def edited(folder: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda config, tensors: config.update(model_type="t5"), "model of type t5"),
        (lambda config, tensors: tensors.popitem(), "does not fit its configuration"),
        (lambda config, tensors: tensors.clear(), "holds no"),
        (
            lambda config, tensors: tensors.update({"model.invertible_adapters.words.F.0.weight": torch.ones(2)}),
            "an invertible adapter's key",
        ),
        (lambda config, tensors: next(iter(tensors.values())).fill_(float("nan")), "NaN"),
        (lambda config, tensors: tensors.update({key: value.int() for key, value in tensors.items()}), "no floats"),
        (lambda config, tensors: config.update(regraft_lineage={"version": "9"}), "later"),
        (lambda config, tensors: config.update(regraft_lineage=7), "lineage"),
    ],
)
def test_what_cannot_be_read_is_told(smalls: list[Small], tmp_path: Path, edit: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_bottlenecks(edited(saved(smalls, tmp_path / "odd"), edit))


def test_older_names_are_read(smalls: list[Small], words: Path, tmp_path: Path) -> None:
    def older(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del config["version"]
        config["config"]["non_linearity"] = "gelu"
        for key in list(tensors):
            tensors[key.replace(".adapters.", ".layer_text_task_adapters.")] = tensors.pop(key)

    found = load_bottlenecks(edited(saved(smalls, tmp_path / "older"), older))
    assert found.form.non_linearity == "gelu_new"
    assert found.tables.keys() == load_bottlenecks(words).tables.keys()
