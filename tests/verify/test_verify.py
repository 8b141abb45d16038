from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from regraft import open_base, port
from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.errors import InputError
from regraft.report.schema import VerifyReport
from regraft.runtime import load_model
from regraft.singular import print_of
from regraft.tensors import InMemory
from regraft.updates import LowRank, SpectralShift
from regraft.verify import verify

FAMILIES: dict[str, tuple[Callable[..., Path], list[str]]] = {
    "llama": (tiny.llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (tiny.gpt2, ["c_attn", "c_fc"]),
    "bert": (tiny.bert, ["query", "value"]),
    "unet": (tiny.unet, ["to_q", "to_v", "to_out.0"]),
    "pipeline": (tiny.pipeline, ["to_q", "to_v", "to_out.0", "v_proj"]),
}


def _case(family: str, folder: Path) -> tuple[Path, Adapter]:
    make, targets = FAMILIES[family]
    old = make(folder / "old")
    return old, tiny.lora(dict(load_model(old).components), targets)


def _scaled(adapter: Adapter, strength: float) -> Adapter:
    updates = {ref: u.scaled(strength) for ref, u in adapter.updates.items() if isinstance(u, LowRank)}
    return replace(adapter, updates=updates)


def _mean(report: VerifyReport, control: str | None = None) -> float:
    value = (report if control is None else report.controls[control]).effect_cosine.mean
    assert value is not None
    return value


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_its_own_base_survives_exactly(family: str, tmp_path: Path) -> None:
    old, adapter = _case(family, tmp_path)
    report = verify(adapter, adapter, old, old, n_inputs=6)
    for value in (report.effect_cosine, report.effect_norm_ratio, report.controls["copy"].effect_cosine):
        assert value.mean == pytest.approx(1, abs=1e-9)
        assert value.low == pytest.approx(1, abs=1e-9)
    none, random = report.controls["none"], report.controls["random"]
    assert none.effect_cosine.mean is None
    assert none.effect_cosine.reason == "there is no adapter, so no effect"
    assert none.effect_norm_ratio.mean == 0
    assert random.effect_norm_ratio.mean is not None
    assert 0.01 < random.effect_norm_ratio.mean < 100
    assert abs(_mean(report, "random")) < 0.5
    if family in ("llama", "gpt2"):
        assert report.kl is not None
        assert report.kl.mean == 0
        assert none.kl is not None
        assert none.kl.mean is not None
        assert none.kl.mean > 1e-4
    else:
        assert report.kl is None
    assert json.loads(report.to_json())["from"] == str(old)


@pytest.mark.parametrize("family", ["llama", "unet"])
def test_an_adapter_of_strength_0_has_no_direction(family: str, tmp_path: Path) -> None:
    old, adapter = _case(family, tmp_path)
    report = verify(adapter, _scaled(adapter, 0.0), old, old, n_inputs=2)
    assert report.effect_cosine.mean is None
    assert report.effect_cosine.reason == "no effect on the new base"
    assert report.effect_norm_ratio.mean == 0
    other_way = verify(_scaled(adapter, 0.0), adapter, old, old, n_inputs=2)
    assert other_way.effect_cosine.reason == "the original has no effect on the old base"
    assert other_way.effect_norm_ratio.mean is None


def test_half_the_strength_shows_in_the_norm_ratio(tmp_path: Path) -> None:
    old, adapter = _case("llama", tmp_path)
    weak = _scaled(adapter, 0.02)
    report = verify(weak, _scaled(weak, 0.5), old, old, n_inputs=4)
    assert report.effect_norm_ratio.mean == pytest.approx(0.5, abs=0.02)
    assert report.effect_cosine.mean == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("family", ["llama", "bert", "pipeline"])
def test_a_light_drift_keeps_a_copy_and_an_independent_base_does_not(family: str, tmp_path: Path) -> None:
    make, _ = FAMILIES[family]
    old, adapter = _case(family, tmp_path)
    near, far = make(tmp_path / "near", drift=0.02), make(tmp_path / "far", seed=5)
    kept, lost = (verify(adapter, adapter, old, new, n_inputs=4) for new in (near, far))
    assert _mean(kept, "copy") == _mean(kept) > 0.9
    assert abs(_mean(lost, "copy")) < 0.35
    assert abs(_mean(kept, "random")) < 0.35
    low, high = kept.effect_cosine.low, kept.effect_cosine.high
    assert low is not None
    assert high is not None
    assert low <= _mean(kept) <= high


def test_numbers_of_the_old_base_s_singular_values_have_no_copy(tmp_path: Path) -> None:
    folders = [tiny.llama(tmp_path / f"{drift}", drift=drift) for drift in (0.0, 0.2)]
    old, new = (open_base(folder) for folder in folders)
    ref = ModuleRef(MODEL, "model.layers.0.self_attn.q_proj")
    shift = SpectralShift(InMemory(torch.full((16,), 0.3)), stamp=InMemory(print_of(old.weight(ref))))
    adapter = Adapter({ref: shift}, "lycoris")
    report = verify(adapter, port(adapter, old, new, "procrustes").adapter, *folders, n_inputs=4)
    assert _mean(report) > 0.5
    assert "can't be copied" in (report.controls["copy"].effect_cosine.reason or "")


def test_the_same_seed_gives_the_same_report(tmp_path: Path) -> None:
    old, adapter = _case("llama", tmp_path)
    new = tiny.llama(tmp_path / "new", drift=0.05)
    once, again = (verify(adapter, adapter, old, new, n_inputs=4, seed=3) for _ in range(2))
    other = verify(adapter, adapter, old, new, n_inputs=4, seed=4)
    assert once.model_copy(update={"seconds": 0}) == again.model_copy(update={"seconds": 0})
    assert once.effect_cosine != other.effect_cosine


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_other_widths_leave_what_can_be_compared(family: str, tmp_path: Path) -> None:
    make, targets = FAMILIES[family]
    old, adapter = _case(family, tmp_path)
    new = make(tmp_path / "new", width=32)
    ported = tiny.lora(load_model(new).main, targets)
    report = verify(adapter, ported, old, new, n_inputs=4)
    copy = report.controls["copy"]
    assert copy.effect_norm_ratio.mean is None
    assert copy.effect_norm_ratio.reason == "no module of the original has its name and shape in the new base"
    if family == "llama":
        assert report.effect_cosine.mean is not None
        return
    assert report.effect_cosine.mean is None
    assert "different shapes" in (report.effect_cosine.reason or "")
    assert report.effect_norm_ratio.mean is not None
    assert "relative to its own model's output" in (report.effect_norm_ratio.reason or "")
    assert "can't be compared" in report.summary


def test_denoisers_of_other_widths_are_compared_on_the_noise_that_they_predict(tmp_path: Path) -> None:
    old, adapter = _case("pipeline", tmp_path)
    new = tiny.pipeline(tmp_path / "new", seed=2, channels=(12, 16))
    ported = tiny.lora(dict(load_model(new).components), FAMILIES["pipeline"][1])
    report = verify(adapter, ported, old, new, n_inputs=2)
    assert report.effect_cosine.mean is not None
    assert "modules have no place in the new base" in (report.controls["copy"].effect_cosine.reason or "")


def test_denoisers_that_predict_different_things_are_not_compared(tmp_path: Path) -> None:
    old, adapter = _case("pipeline", tmp_path)
    new = tiny.pipeline(tmp_path / "new", prediction="v_prediction")
    report = verify(adapter, adapter, old, new, n_inputs=2)
    assert report.effect_cosine.reason == "the models predict or read different things, epsilon and v_prediction"


def test_unets_with_other_latents_are_not_compared(tmp_path: Path) -> None:
    old, adapter = _case("unet", tmp_path)
    report = verify(adapter, adapter, old, tiny.unet(tmp_path / "new", latents=3), n_inputs=2)
    assert report.effect_cosine.reason == "the latents have different shapes, (4, 8, 8) and (3, 8, 8)"
    assert report.effect_norm_ratio.mean is not None
    report = verify(adapter, tiny.lora(load_model(tiny.unet(tmp_path / "wide", context=12)).main, ["to_q"]), old,
                    tmp_path / "wide", n_inputs=2)  # fmt: skip
    assert "read different things" in (report.effect_cosine.reason or "")


def test_a_text_encoder_lora_acts_through_the_prompt(tmp_path: Path) -> None:
    old = tiny.pipeline(tmp_path / "old")
    adapter = tiny.lora({"text_encoder": load_model(old).components["text_encoder"]}, ["q_proj", "v_proj", "fc1"])
    report = verify(adapter, adapter, old, old, n_inputs=2, prompts=["a cat", "a dog"])
    assert report.effect_cosine.mean == pytest.approx(1)
    assert report.prompts == ["a cat", "a dog"]
    old_names = replace(
        adapter, updates={ModuleRef(c, f"text_model.{path}"): u for (c, path), u in adapter.updates.items()}
    )
    assert verify(adapter, old_names, old, old, n_inputs=2).effect_cosine.mean == pytest.approx(1)


def test_prompts_are_read_by_the_models_own_tokenizers(tmp_path: Path) -> None:
    old, adapter = _case("llama", tmp_path)
    new = tiny.llama(tmp_path / "new", drift=0.05)
    with pytest.raises(InputError, match="no tokenizer to read the prompts"):
        verify(adapter, adapter, old, new, prompts=["the river"])
    tiny.write_tokenizer(old)
    tiny.write_tokenizer(new)
    prompts = ["the river and the rain", "it was on a river", "rain"]
    report = verify(adapter, adapter, old, new, prompts=prompts)
    assert (report.n_inputs, report.inputs) == (3, "the 3 texts given")
    assert report.effect_cosine.mean is not None
    tiny.write_tokenizer(new, [*tiny.WORDS, "new", "words"])
    assert verify(adapter, adapter, old, new, prompts=prompts).effect_cosine == report.effect_cosine
    tiny.write_tokenizer(new, reversed(tiny.WORDS))
    other = verify(adapter, adapter, old, new, prompts=prompts)
    assert other.effect_cosine.reason == "the two models split text into different tokens"
    assert other.kl is not None
    assert other.kl.mean is None
    assert other.effect_norm_ratio.mean is not None


def test_encoders_read_sentences_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    old, adapter = _case("bert", tmp_path)
    assert "random token ids" in verify(adapter, adapter, old, old, n_inputs=2).inputs
    tiny.write_tokenizer(old)
    report = verify(adapter, adapter, old, old, n_inputs=66)
    assert report.inputs == "66 plain English sentences"
    assert "on the pooled embedding: 1.00" in report.summary


def test_a_model_with_more_added_tokens_is_compared_on_the_common_ones(tmp_path: Path) -> None:
    old, adapter = _case("llama", tmp_path)
    new = tiny.llama(tmp_path / "new", vocab=56)
    tiny.write_tokenizer(old)
    tiny.write_tokenizer(new)
    assert verify(adapter, adapter, old, new, n_inputs=2).effect_cosine.mean is not None


def test_denoisers_without_text_say_so(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "old")
    adapter = tiny.lora({"unet": unet}, ["to_q", "to_v"])
    report = verify(adapter, adapter, tmp_path / "old", tmp_path / "old", n_inputs=2)
    assert report.effect_cosine.mean == pytest.approx(1)
    assert (report.prompts, "no prompts" in report.inputs) == ([], True)
    for base in (tmp_path / "old", tmp_path / "old" / "unet"):
        with pytest.raises(InputError, match="reads no prompts"):
            verify(adapter, adapter, base, base, prompts=["a cat"])
    with pytest.raises(InputError, match="one base is a pipeline and the other a U-Net alone"):
        verify(adapter, adapter, tmp_path / "old", tmp_path / "old" / "unet", n_inputs=1)


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    old, adapter = _case("bert", tmp_path)
    stray = replace(adapter, updates={ModuleRef(MODEL, "no.such"): next(iter(adapter.updates.values()))})
    with pytest.raises(InputError, match=r"no\.such: no such module"):
        verify(stray, adapter, old, old, n_inputs=1)
    with pytest.raises(InputError, match=r"no\.such: no such module"):
        verify(adapter, stray, old, old, n_inputs=1)
    with pytest.raises(InputError, match="no such file or folder"):
        verify(adapter, adapter, tmp_path / "nowhere", old)
    with pytest.raises(InputError, match="is no diffusion model"):
        verify(*[tiny.lora(tiny.unet_model(), ["to_q"])] * 2, tiny.unet(tmp_path / "unet"), old, n_inputs=1)


def test_progress_is_told_for_every_input(tmp_path: Path) -> None:
    old, adapter = _case("bert", tmp_path)
    told: list[tuple[int, int, str]] = []
    verify(adapter, adapter, old, old, n_inputs=3, tick=lambda *step: told.append(step))
    assert [step[0] for step in told] == list(range(1, 19))
    assert told[-1] == (18, 18, "new base + random")


def test_broken_outputs_are_an_error_not_a_figure(tmp_path: Path) -> None:
    old, adapter = _case("bert", tmp_path)
    with pytest.raises(Exception, match="output of old base \\+ original holds NaN or Inf"):
        verify(_scaled(adapter, float("inf")), adapter, old, old, n_inputs=1)


def test_pooled_embeddings_need_positions() -> None:
    from regraft.probes.effects import compare

    flat = torch.zeros(2, 3), torch.ones(2, 3)
    assert compare(flat, flat, comparable=True).pooled == pytest.approx(1)
    square = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert compare(square, square, comparable=True).pooled is None
