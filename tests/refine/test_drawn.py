"""Where two bases have other autoencoders, the new one learns to denoise what the old one draws with its adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft import Adapter, InputError, UsageError, open_base
from regraft.lineage import with_port
from regraft.methods.task import Running
from regraft.probes.sentences import PICTURE_PROMPTS
from regraft.refine import RefineSettings, drawn, inputs_of, pictures, refine
from regraft.refine.drawn import PictureBatch, picture_aims, picture_samples
from regraft.refine.samples import objective_of
from regraft.refine.shared import unshared
from regraft.refine.starting import _of_kind, refine_entry, start_of
from regraft.runtime import load_model
from regraft.runtime.both import BothModels
from regraft.runtime.latents import Latents
from verify import tiny

QUICK = RefineSettings(steps=16, look=8, n_inputs=64, rate=3e-2, retention=0.2, prompts=("a cat", "rain"))


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "STEPS", 2)
    monkeypatch.setattr(drawn, "LEVELS", 8)


@pytest.fixture(scope="module")
def here(folder: Path) -> Path:
    return tiny.pipeline(folder / "here", prediction="v_prediction")


@pytest.fixture(scope="module")
def there(folder: Path) -> Path:
    """Another autoencoder, other widths, and noise for a target."""
    return tiny.pipeline(folder / "there", seed=5, channels=(8, 12))


@pytest.fixture(scope="module")
def adapter(here: Path) -> Adapter:
    return tiny.lora({"unet": load_model(here).main}, ("to_q", "to_v"), size=0.4)


@pytest.fixture(scope="module")
def both(here: Path, there: Path) -> BothModels:
    return BothModels.load(open_base(here), open_base(there))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_target_of_a_noisy_state_is_the_prediction_that_stands_for_its_picture(prediction: str) -> None:
    if prediction == "flow":
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler: Any = FlowMatchEulerDiscreteScheduler()
    else:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(prediction_type=prediction)
    space = Latents(SimpleNamespace(pipeline=SimpleNamespace(scheduler=scheduler)))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 6, 4, 8, 8, generator=generator).unbind()
    times = torch.tensor([100, 250, 400, 550, 700, 850])
    alpha, sigma = space.levels(times)
    state, target = alpha * clean + sigma * noise, space.target(clean, noise, times)
    torch.testing.assert_close(space.clean(target, state, times), clean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(space.prediction(clean, state, times), target, rtol=1e-3, atol=1e-3)


def test_an_autoencoder_is_another_by_what_it_makes_of_pictures(here: Path, there: Path, folder: Path) -> None:
    same = BothModels.load(open_base(here), open_base(here))
    assert unshared(same) == ""
    assert objective_of("auto", same)[0] == "output"
    # A decoder alone that was trained on leaves the latents as they are.
    with torch.no_grad():
        for parameter in same.new.pipeline.vae.decoder.parameters():
            parameter.add_(0.1)
    assert unshared(same) == ""
    other = BothModels.load(
        open_base(here), open_base(tiny.pipeline(folder / "other", seed=5, prediction="v_prediction"))
    )
    assert "autoencoders differ" in unshared(other)
    assert "predicts v_prediction, the new one epsilon" in unshared(BothModels.load(open_base(here), open_base(there)))
    with pytest.raises(UsageError, match="autoencoders differ"):
        objective_of("effect", other)


def test_pictures_are_learnt_in_the_new_bases_latents_under_its_own_loss(adapter: Adapter, both: BothModels) -> None:
    batches = picture_samples(both, adapter, 32, 0, None, kept=True)
    own = [batch for batch in batches.fit if batch.made_by == "adapter"]
    assert sum(len(batch) for batch in own) == 32
    for batch in batches.fit:
        assert isinstance(batch, PictureBatch)
        name, states = batch.latents
        alpha, sigma = Latents(both.new).levels(batch.timesteps)
        # The new base predicts noise: what is left of a state without it is a picture's latents.
        clean = (states - sigma * batch.target) / alpha
        assert name == "sample"
        assert clean.shape == states.shape
        assert float(clean.abs().max()) < 50


def test_the_new_base_alone_is_nothing_and_the_old_ones_gain_is_all(adapter: Adapter, both: BothModels) -> None:
    batches = picture_samples(both, adapter, 32, 0, None, kept=True)
    fit = [replace(batch, left=0.75) for batch in batches.fit if isinstance(batch, PictureBatch)]
    for aim, batch in zip(picture_aims(both, fit), fit, strict=True):
        alone = batch.run(both.new, "new")
        if aim.retention:
            assert float(aim.distance(aim.told(alone))) == 0.0
            continue
        loss = float((alone - batch.target).square().mean())
        assert float(aim.distance(aim.told(alone))) == pytest.approx(aim.size, rel=1e-5)
        assert aim.size == pytest.approx(0.25 * loss, rel=1e-5)
        # Outputs whose loss is three quarters of it.
        better = batch.target + 0.75**0.5 * (alone - batch.target)
        assert float(aim.distance(aim.told(better))) == pytest.approx(0.0, abs=1e-5 * loss)


def test_a_student_gains_on_pictures_that_it_never_saw(
    adapter: Adapter, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Untrained denoisers denoise nothing: as if the adapter took a fifth of the old base's loss away.
    monkeypatch.setattr(drawn, "_own_losses", lambda model, with_, found, seed: (torch.ones(1), torch.tensor([0.8])))
    old, new = open_base(here), open_base(there)
    zero = replace(adapter, updates=_of_kind(adapter, old, new), metadata=with_port(adapter, refine_entry(old, new)))
    result = refine(adapter, old, new, start=zero, settings=QUICK)
    assert result.report.objective == "sample"
    assert result.report.recovered > 0.02
    assert "read by the new base's autoencoder" in result.report.inputs
    assert result.report.inputs.endswith("for 2 given prompts")
    assert "by the new base, for retention" in result.report.inputs
    result = refine(adapter, old, new, start=zero, settings=replace(QUICK, steps=2, retention=None))
    assert "for retention" not in result.report.inputs


def test_a_start_is_found_across_autoencoders(adapter: Adapter, here: Path, there: Path) -> None:
    start = start_of(adapter, open_base(here), open_base(there), Running(16, 0, ("a cat",), None, "cpu"))
    assert start.how in ("stream", "zero")
    assert start.adapter.updates


def test_a_filter_keeps_the_pictures_on_which_the_adapter_matters_most(
    adapter: Adapter, both: BothModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = torch.arange(12.0)
    seen: list[int] = []
    at = drawn.Drawn.at

    def chosen(pictures: drawn.Drawn, which: Tensor | slice) -> drawn.Drawn:
        if isinstance(which, Tensor):
            seen.extend(which.tolist())
        return at(pictures, which)

    monkeypatch.setattr(drawn.Drawn, "at", chosen)
    monkeypatch.setattr(drawn, "_own_losses", lambda model, with_, found, seed: (20 + gaps, torch.full((12,), 20.0)))
    batches = picture_samples(both, adapter, 32, 0, None, kept=False, dropped=0.5)
    assert seen == list(range(6, 12))
    assert "out of 12" in batches.made


@pytest.mark.parametrize(("value", "said"), [(0.0, "blank"), (float("nan"), "no numbers")])
def test_an_old_base_that_draws_nothing_useful_is_told(
    adapter: Adapter, both: BothModels, monkeypatch: pytest.MonkeyPatch, value: float, said: str
) -> None:
    monkeypatch.setattr(Latents, "decode", lambda space, latents: torch.full((len(latents), 3, 16, 16), value))
    with pytest.raises(InputError, match=said):
        picture_samples(both, adapter, 32, 0, None, kept=False)


def test_a_denoiser_alone_has_no_pictures_to_hand_over(adapter: Adapter, both: BothModels) -> None:
    bare = replace(both, new=replace(both.new, pipeline=None))
    with pytest.raises(InputError, match="no pictures can be handed over"):
        picture_samples(bare, adapter, 32, 0, None, kept=False)


def test_prompts_of_its_training_are_drawn_and_the_report_says_so(
    adapter: Adapter, both: BothModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    draw = drawn.draw_pictures

    def noted(model: Any, given: Any, *rest: Any) -> Any:
        texts.extend(given)
        return draw(model, given, *rest)

    monkeypatch.setattr(drawn, "draw_pictures", noted)
    tagged = replace(
        adapter, metadata={"ss_tag_frequency": '{"1_x": {"ink": 3, "cat": 2}}', "ss_resolution": "(24, 16)"}
    )
    found = inputs_of(both, tagged, replace(QUICK, prompts=None, n_inputs=32, retention=0.0), sampled=True)
    assert "its training's tags" in found.made
    assert "ink" in texts
    assert any(text in PICTURE_PROMPTS for text in texts)


@pytest.mark.parametrize("sampled", [True, False])
def test_all_pictures_are_drawn_with_the_guidance_that_was_asked_for(
    adapter: Adapter, both: BothModels, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    seen: list[tuple[Any, Any]] = []
    draw = pictures.sample_latents

    def noted(model: Any, *args: Any, **settings: Any) -> Any:
        seen.append((model.main, settings["guidance_scale"]))
        return draw(model, *args, **settings)

    monkeypatch.setattr(pictures, "sample_latents", noted)
    inputs_of(both, adapter, replace(QUICK, n_inputs=32, guidance=1.5), sampled=sampled)
    assert {model for model, _ in seen} == {both.old.main, both.new.main}
    assert {guidance for _, guidance in seen} == {1.5}


def test_guidance_is_the_pipelines_own(both: BothModels) -> None:
    made = drawn.draw_pictures(both.new, ["a cat"], 1, 7, guidance=1.5).latents
    by_default = drawn.draw_pictures(both.new, ["a cat"], 1, 7).latents
    for guidance, found in ((1.5, made), (7.5, by_default)):
        generator = torch.Generator().manual_seed(7)
        wanted = both.new.pipeline(
            ["a cat"], num_inference_steps=2, guidance_scale=guidance, generator=generator, output_type="latent"
        ).images
        assert torch.allclose(found, wanted.cpu(), atol=1e-4)
    assert (made - by_default).abs().max() > 1e-3


def test_texts_have_no_guidance(adapter: Adapter, old: Path, drifted: Path) -> None:
    words = tiny.lora(load_model(old).main, ("q_proj",), size=0.5)
    with pytest.raises(InputError, match="Leave --guidance out"):
        refine(words, open_base(old), open_base(drifted), settings=replace(QUICK, guidance=2.0), start="zero")
