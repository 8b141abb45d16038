"""A soft prompt or a prefix goes to another base: started by an embedding map, and taught the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from running import Run
from torch import Tensor

from regraft import InputError, UsageError, open_base
from regraft.refine import RefineSettings
from regraft.refine.virtual import SoftPrompt, load_soft_prompt, refine_soft_prompt, start_of
from regraft.refine.words import shared_embeddings
from regraft.runtime import load_model
from regraft.runtime.both import BothModels
from verify import tiny

QUICK = RefineSettings(steps=40, look=10, n_inputs=16, rate=2e-2)
TOKENS = 4


def made(base: Path, folder: Path, kind: type[peft.PeftConfig] = peft.PromptTuningConfig, size: float = 1.0) -> Path:
    """PEFT's own soft prompt of large random vectors, as PEFT saves it."""
    torch.manual_seed(3)
    model = peft.get_peft_model(load_model(base).main, kind(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    weight = model.prompt_encoder["default"].embedding.weight
    weight.data = size * torch.randn(weight.shape)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def prompt(old: Path, tmp_path: Path) -> SoftPrompt:
    return load_soft_prompt(made(old, tmp_path / "prompt"))


def said(base: Path, folder: Path) -> Tensor:
    ids = torch.randint(3, 48, (4, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = peft.PeftModel.from_pretrained(load_model(base).main, folder)(input_ids=ids).logits
    return logits[:, -12:].log_softmax(-1)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_from_a_base_to_itself_the_vectors_stay(old: Path, tmp_path: Path, kind: type[peft.PeftConfig]) -> None:
    before = load_soft_prompt(made(old, tmp_path / "prompt", kind))
    result = refine_soft_prompt(before, open_base(old), open_base(old), settings=QUICK)
    assert torch.equal(result.prompt.values, before.values)
    assert result.report.recovered == pytest.approx(1.0, abs=1e-4)


def test_where_the_embeddings_were_turned_the_prompt_is_turned_as_they_were(
    prompt: SoftPrompt, old: Path, tmp_path: Path
) -> None:
    model = load_model(old).main
    table = model.get_input_embeddings().weight
    turn = torch.linalg.qr(torch.randn(table.shape[1], table.shape[1], generator=torch.Generator().manual_seed(1)))[0]
    table.data = table.data @ turn
    model.save_pretrained(tmp_path / "turned")
    tiny.write_tokenizer(tmp_path / "turned")
    start, how = start_of(prompt, BothModels.load(open_base(old), open_base(tmp_path / "turned")))
    torch.testing.assert_close(start, prompt.values @ turn, rtol=1e-3, atol=1e-3)
    assert how.startswith("embedding map")


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_it_ends_nearer_to_the_old_base_with_its_prompt_and_peft_loads_it(
    old: Path, tmp_path: Path, kind: type[peft.PeftConfig]
) -> None:
    new = tiny.llama(tmp_path / "new", drift=0.4)
    before = load_soft_prompt(made(old, tmp_path / "prompt", kind))
    bases = open_base(old), open_base(new)
    result = refine_soft_prompt(before, *bases, settings=QUICK)
    assert result.report.recovered > result.report.beside[1].recovered + 0.02
    files = result.save(tmp_path / "refined")
    assert {file.name for file in files} == {"adapter_model.safetensors", "adapter_config.json"}
    wanted = said(old, tmp_path / "prompt")

    def away(folder: Path) -> float:
        return float((wanted.exp() * (wanted - said(new, folder))).sum(-1).mean())

    assert away(tmp_path / "refined") < away(tmp_path / "prompt")


def test_the_command_writes_peft_s_folder_with_its_lineage(
    prompt: SoftPrompt, old: Path, drifted: Path, tmp_path: Path, run: Run
) -> None:
    ran = run("refine", prompt.path, "--from", old, "--to", drifted, "-o", tmp_path / "out", "--steps", "10", "--json")
    assert ran.code == 0
    record = json.loads(ran.out)
    assert record["outputs"] == [
        str(tmp_path / "out" / name) for name in ("adapter_model.safetensors", "adapter_config.json")
    ]
    found = load_soft_prompt(tmp_path / "out")
    lineage = json.loads(found.metadata["regraft_lineage"])
    assert lineage["ports"][0]["refined"]["objective"] == "output"
    assert found.config["base_model_name_or_path"] == drifted.name


def test_across_tokenizers_the_shared_words_start_it_and_the_old_bases_texts_teach_it(
    numbered: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = numbered
    before = load_soft_prompt(made(old, tmp_path / "prompt"))
    bases = open_base(old), open_base(new)
    settings = replace(QUICK, steps=1, look=1, n_inputs=32)
    result = refine_soft_prompt(before, *bases, settings=settings)
    assert result.report.objective == "sample"
    assert "different tokens" in result.report.objective_reason
    # The same model whose words have other numbers: what it said with the prompt, it says with it again.
    assert torch.equal(result.prompt.values, before.values)
    assert result.report.recovered == pytest.approx(1.0, abs=1e-3)


def test_across_tokenizers_a_drifted_base_learns_what_the_old_one_writes(
    numbered: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = numbered
    model = load_model(new).main
    torch.manual_seed(4)
    for parameter in model.parameters():
        parameter.data += 0.4 * parameter.std().nan_to_num() * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "drifted")
    load_model(new).tokenizer.save_pretrained(tmp_path / "drifted")
    before = load_soft_prompt(made(old, tmp_path / "prompt"))
    settings = replace(QUICK, n_inputs=64, rate=3e-2)
    result = refine_soft_prompt(before, open_base(old), open_base(tmp_path / "drifted"), settings=settings)
    assert result.report.start == "embedding map of 48 shared tokens"
    assert result.report.recovered > result.report.looks[0].recovered + 0.05


def test_a_space_is_the_same_however_it_is_spelt(tmp_path: Path) -> None:
    for name, words in (("bytes", ("Ġriver", "Ġrain", "a", "b")), ("pieces", ("a", "▁rain", "▁river", "c"))):
        tiny.llama(tmp_path / name)
        tiny.write_tokenizer(tmp_path / name, words)
    models = BothModels.load(open_base(tmp_path / "bytes"), open_base(tmp_path / "pieces"))
    ours, theirs = shared_embeddings(models)
    assert torch.equal(ours, models.old.main.get_input_embeddings().weight[[0, 1, 2, 3, 4, 5]])
    assert torch.equal(theirs, models.new.main.get_input_embeddings().weight[[0, 1, 2, 5, 4, 3]])


def test_where_few_words_are_shared_it_begins_at_the_mean_embedding(prompt: SoftPrompt, folder: Path) -> None:
    for name, words in (("here", ("a", "b")), ("there", ("c", "d"))):
        tiny.llama(folder / name, seed=len(words[0]))
        tiny.write_tokenizer(folder / name, words)
    models = BothModels.load(open_base(folder / "here"), open_base(folder / "there"))
    start, how = start_of(prompt, models)
    torch.testing.assert_close(start, models.new.main.get_input_embeddings().weight.mean(0).expand(TOKENS, -1))
    assert how == "mean embedding (3 shared tokens are too few for a map)"


def test_a_second_run_writes_no_new_texts(
    prompt: SoftPrompt, old: Path, drifted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases, asked = (open_base(old), open_base(drifted)), replace(QUICK, steps=1, look=1)
    first = refine_soft_prompt(prompt, *bases, settings=asked)
    monkeypatch.setattr("regraft.refine.unported.make_batches", lambda *args: pytest.fail("made again"))
    again = refine_soft_prompt(prompt, *bases, settings=replace(asked, rate=1e-3))
    assert again.report.looks[0].recovered == first.report.looks[0].recovered


def test_a_prompt_of_another_base_is_told(prompt: SoftPrompt, old: Path, tmp_path: Path) -> None:
    wider = tiny.llama(tmp_path / "wider", width=24)
    with pytest.raises(InputError, match="vectors of 16 numbers"):
        refine_soft_prompt(prompt, open_base(wider), open_base(old), settings=QUICK)


@pytest.mark.parametrize("asked", [{"hidden": 1.0}, {"quantize": "4bit"}])
def test_what_has_no_meaning_for_a_prompt_is_told(prompt: SoftPrompt, old: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="outputs of the whole base"):
        refine_soft_prompt(prompt, open_base(old), open_base(old), settings=replace(QUICK, **asked))


def test_a_prompt_draws_nothing(prompt: SoftPrompt, old: Path) -> None:
    with pytest.raises(UsageError, match="Leave --guidance out"):
        refine_soft_prompt(prompt, open_base(old), open_base(old), settings=replace(QUICK, guidance=2.0))


def test_a_damaged_file_is_told_in_a_line(
    prompt: SoftPrompt, old: Path, drifted: Path, run: Run, tmp_path: Path
) -> None:
    (prompt.path / "adapter_model.safetensors").write_bytes(b"damaged")
    ran = run("refine", prompt.path, "--from", old, "--to", drifted, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()
