"""PiSSA's and OLoRA's adapters as LoRAs of the base as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from running import Run
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from regraft import InputError, load_adapter
from regraft.ops.convert import convert_adapter
from regraft.runtime.applied import applied
from regraft.updates import LowRank

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(12)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **SIZES))
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data = torch.randn_like(weight) / weight.shape[1] ** 0.5
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(base: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(base).eval()


def trained(base: Path, folder: Path, how: str, **options: Any) -> Tensor:
    """What the model says with a trained adapter, which is saved as PEFT does without being asked for more."""
    targets = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=how, **options)
    tuned = peft.get_peft_model(opened(base), config)
    optimiser = torch.optim.Adam([weight for weight in tuned.parameters() if weight.requires_grad], lr=0.02)
    for _ in range(5):
        optimiser.zero_grad()
        tuned(input_ids=IDS, labels=IDS.flip(1)).loss.backward()
        optimiser.step()
    tuned.save_pretrained(folder)
    with torch.no_grad():
        return tuned.eval()(input_ids=IDS).logits


def said(base: Path, adapter: Path) -> Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(opened(base), adapter).eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("how", "options"),
    [("pissa", {}), ("pissa", {"use_rslora": True}), ("pissa", {"use_dora": True}), ("olora", {})],
)
def test_peft_loads_them_on_the_base_as_it_was(how: str, options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    expected = trained(base, tmp_path / "trained", how, **options)
    with torch.no_grad():
        plain = opened(base)(input_ids=IDS).logits
    report = convert_adapter(tmp_path / "trained", tmp_path / "plain", "peft", base=base)
    assert any(how in note for note in report.notes)
    assert float((expected - plain).norm()) > 0.1 * float(plain.norm())
    torch.testing.assert_close(said(base, tmp_path / "plain"), expected, rtol=1e-3, atol=1e-4)
    made = load_adapter(tmp_path / "plain").updates
    # Beside an embedding's update PEFT saves the embedding itself.
    ranks = {ref.path: update.rank for ref, update in made.items() if isinstance(update, LowRank)}
    assert ranks.pop("model.embed_tokens") == 3
    assert set(ranks.values()) == {6}


def test_in_half_precision_no_more_is_lost_than_of_any_lora(base: Path, tmp_path: Path) -> None:
    """The part that is taken out is many times as large as the update."""
    trained(base, tmp_path / "trained", "pissa")
    for name, dtype in (("plain", None), ("half", torch.bfloat16)):
        convert_adapter(tmp_path / "trained", tmp_path / name, "peft", base=base, save_dtype=dtype)
    exact, half = (load_adapter(tmp_path / name).updates for name in ("plain", "half"))
    for ref, update in exact.items():
        if not isinstance(update, LowRank):
            continue
        change = update.delta()
        assert float((half[ref].delta() - change).norm()) < 0.01 * float(change.norm()), ref


def test_a_converted_one_is_carried_on_and_one_as_saved_is_refused(base: Path, tmp_path: Path, run: Run) -> None:
    trained(base, tmp_path / "trained", "pissa")
    ends = ("--from", base, "--to", base)
    refused = run("port", tmp_path / "trained", *ends, "-o", tmp_path / "ported")
    assert (refused.code, "regraft convert" in refused.err) == (1, True)
    made = run("convert", tmp_path / "trained", "--base", base, "--format", "peft", "-o", tmp_path / "plain")
    assert made.code == 0, made.err
    carried = run("port", tmp_path / "plain", *ends, "-o", tmp_path / "ported")
    assert carried.code == 0, carried.err
    torch.testing.assert_close(said(base, tmp_path / "ported"), said(base, tmp_path / "plain"))


def test_no_format_takes_one_without_its_base(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "trained", "pissa")
    with pytest.raises(InputError, match="init_lora_weights: was trained on a base that pissa had changed"):
        convert_adapter(tmp_path / "trained", tmp_path / "x.safetensors", "comfyui")
    with pytest.raises(InputError, match="pissa had changed"):
        convert_adapter(tmp_path / "trained", tmp_path / "x.safetensors", "peft")
    assert not (tmp_path / "x.safetensors").exists()


def test_none_is_merged_resized_or_run_as_if_it_were_plain(base: Path, tmp_path: Path, run: Run) -> None:
    trained(base, tmp_path / "trained", "olora")
    both = (tmp_path / "trained", tmp_path / "trained")
    for asked in (("merge", *both), ("resize", tmp_path / "trained", "--rank", "2")):
        result = run(*asked, "-o", tmp_path / "out")
        assert (result.code, "olora had changed" in result.err) == (1, True), result.err
    with pytest.raises(InputError, match="olora had changed"), applied({"model": opened(base)}, load_adapter(both[0])):
        pass


def test_a_dry_run_plans_what_is_done(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "trained", "pissa")
    given = (tmp_path / "trained", tmp_path / "plain", "peft")
    planned = convert_adapter(*given, base=base, dry_run=True)
    made = convert_adapter(*given, base=base)
    assert planned.notes == made.notes[: len(planned.notes)]
    assert [change.name for change in planned.changes] == [change.name for change in made.changes]


def test_what_was_drawn_at_random_is_refused_with_its_base_too(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "trained", "pissa_niter_2")
    for dry in (False, True):
        with pytest.raises(InputError, match=r"pissa_niter_2 had changed first.*path_initial_model"):
            convert_adapter(tmp_path / "trained", tmp_path / "plain", "peft", base=base, dry_run=dry)


def test_a_base_of_other_sizes_is_told(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "trained", "pissa")
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **{**SIZES, "hidden_size": 32})).save_pretrained(tmp_path / "other")
    for dry in (False, True):
        with pytest.raises(
            InputError, match=r"down_proj: the weight is \(32, 24\) where the adapter was trained on \(16, 24\)"
        ):
            convert_adapter(tmp_path / "trained", tmp_path / "plain", "peft", base=tmp_path / "other", dry_run=dry)
