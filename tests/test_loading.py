"""One line in diffusers, transformers and PEFT: an adapter is ported on its way into a model in memory."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from running import Run
from safetensors.torch import load_file, save_file

import regraft
from regraft import InputError, open_base
from regraft.lineage.stamp import stamp
from regraft.loading import base_in
from regraft.runtime import load_model
from verify import tiny

PROMPT = {"prompt": "a sun", "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def pipelines(folder: Path) -> tuple[Path, Path]:
    return tiny.pipeline(folder / "sd"), tiny.pipeline(folder / "sd2", drift=0.02)


@pytest.fixture(scope="module")
def lora(pipelines: tuple[Path, Path], folder: Path) -> Path:
    model = load_model(pipelines[0])
    adapter = tiny.lora(
        {"unet": model.main, "text_encoder": model.components["text_encoder"]}, ("to_q", "q_proj"), size=1.0
    )
    adapter.save(folder / "lora.safetensors", format="diffusers")
    return folder / "lora.safetensors"


def _drawn(pipeline: Any) -> Any:
    return pipeline(generator=torch.Generator().manual_seed(0), **PROMPT).images


def test_a_base_in_memory_has_the_fingerprint_of_its_folder(pipelines: tuple[Path, Path], old: Path) -> None:
    for folder in (pipelines[0], old):
        loaded = load_model(folder)
        model = loaded.main if loaded.pipeline is None else loaded.pipeline
        here, there = base_in(model), open_base(folder)
        assert {name: part.sample for name, part in here.prints.components.items()} == {
            name: part.sample for name, part in there.prints.components.items()
        }
    plain = load_model(old).main
    wrapped = get_peft_model(load_model(old).main, LoraConfig(target_modules=["q_proj"]))
    assert str(base_in(wrapped).prints) == str(base_in(plain).prints)
    with pytest.raises(InputError, match="no model and no pipeline"):
        base_in(object())


def test_diffusers_loads_what_was_ported_as_it_loads_the_file(
    pipelines: tuple[Path, Path], lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = pipelines
    saved = tmp_path / "ported.safetensors"
    regraft.port(regraft.load_adapter(lora), open_base(before), open_base(after), "lora-x").save(saved)
    by_file, by_line = load_model(after).pipeline, load_model(after).pipeline
    plain = _drawn(by_line)
    by_file.load_lora_weights(saved)
    with caplog.at_level(logging.WARNING, "regraft"):
        by_line.load_lora_weights(regraft.ported(lora, to=by_line, old=before, method="lora-x"))
    assert "was ported" in caplog.text
    assert np.allclose(_drawn(by_file), _drawn(by_line), atol=1e-4)
    assert np.abs(_drawn(by_line) - plain).max() > 1e-3


def test_what_was_made_for_these_weights_is_loaded_as_it_is(
    pipelines: tuple[Path, Path], lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stamped = tmp_path / "stamped.safetensors"
    stamp(lora, open_base(pipelines[0]), stamped)
    pipeline = load_model(pipelines[0]).pipeline
    with caplog.at_level(logging.WARNING, "regraft"):
        tensors = regraft.ported(stamped, to=pipeline)
    assert caplog.text == ""
    read = regraft.load_adapter(lora)
    for (component, path), update in read.updates.items():
        up, down = (tensors[f"{component}.{path}.lora_{side}.weight"] for side in "BA")
        assert torch.allclose(up.float() @ down.float(), update.delta(), atol=1e-5)


def test_what_to_give_is_said_where_the_lineage_names_other_weights(
    pipelines: tuple[Path, Path], lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamped = tmp_path / "stamped.safetensors"
    stamp(lora, open_base(pipelines[0]), stamped)
    pipeline = load_model(pipelines[1]).pipeline
    with pytest.raises(InputError, match=r"was made for other weights: those of sd\. ") as told:
        regraft.ported(stamped, to=pipeline)
    assert told.value.remedy == (
        "Give old=, the path or hub id of 'sd', which it names as its base; "
        "or migration=, a file of `regraft migration make` from there to this model."
    )
    # Where the name is a path from here, it can be given as it stands.
    monkeypatch.chdir(pipelines[0].parent)
    with pytest.raises(InputError, match=r"Give old='sd', the base that it was trained on"):
        regraft.ported(stamped, to=pipeline)
    assert regraft.ported(stamped, to=pipeline, old="sd", method="copy")


@pytest.mark.parametrize(
    ("metadata", "given"),
    [
        ({}, "old=, the base that it was trained on: a file, a folder or a hub id; or migration="),
        ({"ss_sd_model_name": "sd15.ckpt"}, "old=, the path or hub id of 'sd15.ckpt', which it names as its base; or"),
        ({"ss_sd_model_name": "org/name"}, "old='org/name', the base that it was trained on: a file, a folder or"),
        ({"ss_sd_model_name": "x" * 5000}, f"old=, the path or hub id of '{'x' * 100}…{'x' * 100}', which"),
    ],
)
def test_what_to_give_is_said_where_there_is_no_lineage(
    pipelines: tuple[Path, Path], lora: Path, tmp_path: Path, metadata: dict[str, str], given: str
) -> None:
    file = tmp_path / "told.safetensors"
    save_file(load_file(lora), file, metadata=metadata)
    with pytest.raises(InputError, match="does not say which weights it was made for: it has no lineage") as told:
        regraft.ported(file, to=load_model(pipelines[1]).pipeline)
    assert str(told.value.remedy).startswith(f"Give {given}")
    assert f"regraft lineage stamp {file} --base {pipelines[1]} --in-place" in str(told.value.remedy)


def test_the_stamp_that_the_error_names_makes_the_line_work(
    pipelines: tuple[Path, Path], lora: Path, tmp_path: Path, run: Run
) -> None:
    file = tmp_path / "mine.safetensors"
    shutil.copy(lora, file)
    pipeline = load_model(pipelines[0]).pipeline
    with pytest.raises(InputError) as told:
        regraft.ported(file, to=pipeline)
    (command,) = re.findall(r"stamp it once: regraft (.*)\.$", str(told.value.remedy))
    assert run(*command.split()).code == 0
    assert regraft.ported(file, to=pipeline)


def test_a_language_model_says_what_to_give_too(old: Path, drifted: Path, tmp_path: Path) -> None:
    tiny.lora(load_model(old).main, ("q_proj",), size=1.0).save(tmp_path / "lora")
    with pytest.raises(InputError, match=r"Give old=.*or migration=.*stamp it once"):
        regraft.load_ported(load_model(drifted).main, tmp_path / "lora")


def test_peft_and_transformers_load_ported_adapters(old: Path, drifted: Path, tmp_path: Path) -> None:
    tiny.lora(load_model(old).main, ("q_proj", "v_proj"), size=1.0).save(tmp_path / "lora")
    regraft.port(regraft.load_adapter(tmp_path / "lora"), open_base(old), open_base(drifted), "lora-x").save(
        tmp_path / "p"
    )
    ids = torch.tensor([[3, 4, 5, 6]])
    wanted = PeftModel.from_pretrained(load_model(drifted).main, tmp_path / "p").eval()(ids).logits
    plain = load_model(drifted).main
    regraft.load_ported(plain, tmp_path / "lora", old=old, method="lora-x")
    first = get_peft_model(load_model(drifted).main, LoraConfig(target_modules=["q_proj"]))
    regraft.load_ported(first, tmp_path / "lora", "ported", old=old, method="lora-x")
    first.set_adapter("ported")
    for model in (plain, first.eval()):
        assert torch.allclose(model(ids).logits, wanted, atol=1e-4)
    assert not torch.allclose(load_model(drifted).main(ids).logits, wanted, atol=1e-3)
    with pytest.raises(InputError, match="loads no adapters"):
        regraft.load_ported(object(), tmp_path / "lora")


def test_kinds_that_tensors_alone_can_not_say_are_told(pipelines: tuple[Path, Path], tmp_path: Path) -> None:
    from peft import LoHaConfig

    unet = load_model(pipelines[0]).main
    tuned = get_peft_model(unet, LoHaConfig(target_modules=["to_q"], init_weights=False))
    tuned.save_pretrained(tmp_path / "loha")
    with pytest.raises(InputError, match="is no plain LoRA"):
        regraft.ported(tmp_path / "loha", to=load_model(pipelines[1]).pipeline, old=pipelines[0], method="copy")
