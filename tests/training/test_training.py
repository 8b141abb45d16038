"""An adapter is trained, written as its kind is, says what it belongs to, and loads in the real libraries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from running import Run
from torch import Tensor, nn

from regraft import InputError, OutputError, UsageError, load_adapter, open_base, training
from regraft.lineage import lineage_of
from regraft.report.train_schema import TrainReport
from regraft.runtime import applied, load_model
from regraft.training import KINDS, Look, TrainSettings, loop, state_file, train
from regraft.training.kinds import config_of, default_targets
from regraft.training.lessons import TextLesson, denoising_loss, split
from regraft.training.texts import IGNORED, TextExample, read_examples
from verify import tiny

QUICK = TrainSettings(steps=6, look=3, rate=1e-2, batch=2)
# The tiny models are narrower than these kinds' defaults.
SMALL: dict[str, dict[str, Any]] = {
    "oft": {"rank": 2},
    "fourierft": {"options": {"n_frequency": 8}},
    "lorax": {"options": {"r": 2}},
    "vera": {"rank": 4},
}


def quick(kind: str, **more: Any) -> TrainSettings:
    asked: dict[str, Any] = {"rank": 2 if KINDS[kind].rank else None, **SMALL.get(kind, {}), **more}
    return replace(QUICK, kind=kind, **asked)


@pytest.fixture(scope="module")
def old(folder: Path) -> Path:
    """A language model that reads words."""
    base = tiny.llama(folder / "reader")
    tiny.write_tokenizer(base)
    return base


@pytest.fixture(scope="module")
def texts(folder: Path) -> Path:
    lines = [{"text": "the rain is in the river"}, {"prompt": "the rain", "completion": "is in the river"}] * 4
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "texts.jsonl"


@pytest.fixture(scope="module")
def pictures(folder: Path) -> Path:
    """Blue on black, captioned in both ways; wider than high."""
    place = folder / "pictures"
    place.mkdir()
    for i in range(6):
        picture = Image.new("RGB", (24, 18), (0, 0, 0))
        picture.paste((40, 60, 255), (i, 2, i + 8, 12))
        picture.save(place / f"{i}.png")
    for i in range(3):
        (place / f"{i}.txt").write_text("a cat\n")
    rows = [{"file_name": f"{i}.png", "text": "rain"} for i in range(3, 6)]
    (place / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return place


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Path:
    return tiny.pipeline(folder / "pipe")


def made(data: Path, base: Path, output: Path, settings: TrainSettings = QUICK, **more: Any) -> TrainReport:
    return train(data, open_base(base), output, settings, **more)


def weights(path: Path) -> dict[str, Tensor]:
    return {
        f"{ref}.{name}": part.load()
        for ref, update in load_adapter(path).updates.items()
        for name, part in update.parts().items()
    }


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(12).reshape(2, 6)).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_s_loads_in_peft_and_does_what_regraft_reads(
    kind: str, texts: Path, old: Path, tmp_path: Path
) -> None:
    import peft

    report = made(texts, old, tmp_path / "out", quick(kind))
    assert (report.steps, report.unit, report.modules) == (6, "texts", 14)
    base = load_model(old).main
    alone = logits(base)
    served = logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval())
    assert not torch.allclose(served, alone, atol=1e-4)

    opened = open_base(old)
    adapter = load_adapter(tmp_path / "out")
    merged = load_model(old)
    with applied(merged.components, adapter):
        found = logits(merged.main)
    torch.testing.assert_close(found, served, rtol=1e-3, atol=1e-4)
    lineage = lineage_of(adapter)
    assert lineage is not None
    assert lineage["base"]["fingerprint"] == opened.fingerprint
    assert lineage["ports"] == []


def test_a_first_step_moves_singular_values_two_to_four_times_as_far_as_lora_s_does() -> None:
    """On a layer of 1280. AdamW's first step is the rate in every number, which for these two is a singular value."""
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(1280, 1280, bias=False))
    model = peft.get_peft_model(base, config_of("lora", targets=("0",)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=KINDS["lora"].rate)
    model(torch.randn(8, 1280)).square().sum().backward()
    optimizer.step()
    change = base[0].get_delta_weight("default").detach()
    far = float(torch.linalg.matrix_norm(change, 2))
    for kind in ("lorax", "svdiff"):
        assert 2 < KINDS[kind].rate / far < 4


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_on_a_quantised_base_a_lora_is_trained_as_qlora_does(
    quantize: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = tiny.llama(tmp_path / "wide", width=64)
    tiny.write_tokenizer(base)
    held: list[type] = []
    run = training.run

    def seen(model: Any, *rest: Any) -> Any:
        held.append(type(model.main.model.layers[0].self_attn.q_proj.base_layer))
        return run(model, *rest)

    monkeypatch.setattr(training, "run", seen)
    report = made(texts, base, tmp_path / "out", quick("lora", quantize=quantize))
    layer = bitsandbytes.nn.Linear4bit if quantize == "4bit" else bitsandbytes.nn.Linear8bitLt
    assert issubclass(held[0], layer)
    assert any("bits" in note for note in report.notes)
    model = load_model(base)
    alone = logits(model.main)
    with applied(model.components, load_adapter(tmp_path / "out")):
        assert not torch.allclose(logits(model.main), alone, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "rslora"])
def test_a_pipeline_s_file_loads_in_diffusers_and_draws_the_same_as_the_folder(
    kind: str, pictures: Path, pipe: Path, tmp_path: Path
) -> None:
    import peft

    settings = quick(kind)
    made(pictures, pipe, tmp_path / "file.safetensors", settings)
    made(pictures, pipe, tmp_path / "folder", settings)

    def drawn(pipeline: Any) -> Tensor:
        made = pipeline("rain", num_inference_steps=2, output_type="latent", generator=torch.manual_seed(3))
        found: Tensor = made.images
        return found

    served = load_model(pipe).pipeline
    alone = drawn(served)
    served.load_lora_weights(str(tmp_path), weight_name="file.safetensors")
    by_file = drawn(served)
    other = load_model(pipe).pipeline
    other.unet = peft.PeftModel.from_pretrained(other.unet, str(tmp_path / "folder")).eval()
    assert not torch.allclose(by_file, alone, atol=1e-3)
    torch.testing.assert_close(by_file, drawn(other), rtol=1e-3, atol=1e-4)


def test_it_learns_and_says_so(texts: Path, pictures: Path, old: Path, pipe: Path, tmp_path: Path) -> None:
    longer = replace(QUICK, steps=40, look=20, held=0.25, dropped=0.0)
    for data, base in ((texts, old), (pictures, pipe)):
        looks = made(data, base, tmp_path / base.name, longer).looks
        held = [look.held for look in looks]
        assert held[0] is not None
        assert held[-1] is not None
        assert held[-1] < 0.9 * held[0]


def test_losses_on_texts_are_the_library_s_own_whatever_their_lengths(old: Path) -> None:
    model = load_model(old)
    words = ["the rain", "the rain is in the river", "a river of rain and a river", "the", "it was on"]
    examples = [
        TextExample(ids, ids)
        for text in words
        for ids in [(*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id)]
    ]
    each = []
    for example in examples:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            each.append((len(example.ids) - 1, float(model.main(input_ids=ids, labels=ids).loss)))
    mean = sum(count * loss for count, loss in each) / sum(count for count, _ in each)
    lesson = TextLesson(examples, examples)
    with torch.no_grad():
        assert float(lesson.loss(model, range(5), torch.Generator())) == pytest.approx(mean, rel=1e-4)
    assert lesson.held(model) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_on_pictures_is_that_of_diffusers_training_scripts(prediction: str, tmp_path: Path) -> None:
    model = load_model(tiny.pipeline(tmp_path / "pipe", prediction=prediction))
    clean = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    captions = ["a cat", "rain", ""]
    with torch.no_grad():
        found = float(denoising_loss(model, clean, captions, torch.Generator().manual_seed(5)))
        generator, pipe = torch.Generator().manual_seed(5), model.pipeline
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(pipe.scheduler.config.num_train_timesteps, (3,), generator=generator)
        noisy = pipe.scheduler.add_noise(clean, noise, times)
        ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        said = pipe.unet(noisy, times, pipe.text_encoder(ids)[0]).sample
        wanted = {
            "epsilon": noise,
            "v_prediction": pipe.scheduler.get_velocity(clean, noise, times) if prediction == "v_prediction" else noise,
            "sample": clean,
        }[prediction]
    assert found == pytest.approx(float(torch.nn.functional.mse_loss(said, wanted)), rel=1e-4)


def test_of_a_prompt_only_the_completion_is_learnt(old: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "the rain", "completion": "is in"}))
    model = load_model(old)
    (example,) = read_examples(tmp_path / "a.jsonl", model, 16)
    learnt = [i for i, label in zip(example.ids, example.labels, strict=True) if label != IGNORED]
    assert model.tokenizer.decode(learnt) == "is in </s>"
    assert model.tokenizer.decode(example.ids) == "the rain is in </s>"
    (short,) = read_examples(tmp_path / "a.jsonl", model, 4)
    assert model.tokenizer.decode(short.ids) == "rain is in </s>"


def test_one_that_was_stopped_goes_on_to_the_same_end(
    texts: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = quick("foura")
    made(texts, old, tmp_path / "whole", settings)

    def stop(look: Look) -> None:
        if look.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(texts, old, tmp_path / "parts", settings, heard=stop)
    assert not (tmp_path / "parts").exists()
    steps: list[int] = []
    one_step = loop._Run.one_step
    monkeypatch.setattr(loop._Run, "one_step", lambda run: steps.append(run.step) or one_step(run))  # type: ignore[func-returns-value]
    made(texts, old, tmp_path / "parts", settings)
    assert steps == [3, 4, 5]
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], rtol=1e-5, atol=1e-7)
    assert not state_file(texts, open_base(old), settings).exists()


def test_captions_and_size_are_in_the_file_for_a_later_refine(pictures: Path, pipe: Path, tmp_path: Path) -> None:
    from regraft.refine.prompting import picture_prompts, resolution_of

    made(pictures, pipe, tmp_path / "a.safetensors", quick("lora"))
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert resolution_of(adapter) == (16, 16)
    prompts, _ = picture_prompts(adapter, None)
    assert any("rain" in prompt for prompt in prompts)
    assert any("a cat" in prompt for prompt in prompts)


def test_pictures_are_cropped_at_their_centre(pipe: Path, tmp_path: Path) -> None:
    from regraft.training.picture_data import _pixels

    wide = Image.new("RGB", (48, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (16, 0, 32, 16))
    wide.save(tmp_path / "a.png")
    found = _pixels(load_model(pipe), [tmp_path / "a.png"], 16, 16)
    assert found.shape == (1, 3, 16, 16)
    torch.testing.assert_close(found[0, :, 8, 8], torch.tensor([-1.0, -1.0, 1.0]))
    assert (found[0, 2] == 1).all()
    assert (found[0, 0] == -1).all()


def test_data_is_set_apart_by_the_seed_and_never_learnt() -> None:
    fit, apart = split(40, 0.25, 3)
    assert len(apart) == 10
    assert sorted([*fit, *apart]) == list(range(40))
    assert split(40, 0.25, 3) == (fit, apart) != split(40, 0.25, 4)
    assert split(5, 0.1, 0) == ([0, 1, 2, 3, 4], [])


@pytest.mark.parametrize("kind", ["lorax", "fourierft"])
def test_what_a_file_cannot_hold_is_told_before_the_training(
    kind: str, pictures: Path, pipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="PEFT's folder"):
        made(pictures, pipe, tmp_path / "a.safetensors", quick(kind))


def test_svdiff_is_written_as_its_own_folder(pictures: Path, pipe: Path, tmp_path: Path) -> None:
    made(pictures, pipe, tmp_path / "ours", quick("svdiff"))
    made(pictures, pipe, tmp_path / "theirs", quick("svdiff"), format="svdiff")
    assert load_adapter(tmp_path / "theirs").format == "svdiff"
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    for name, value in theirs.items():
        torch.testing.assert_close(value, ours[name.removeprefix("unet.")])


def edited(path: Path, line: str) -> Path:
    path.write_text(line)
    return path


def test_bad_input_is_told_in_a_line(
    texts: Path, pictures: Path, old: Path, pipe: Path, tmp_path: Path, run: Run
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    bert = tiny.bert(tmp_path / "bert")
    unet = tiny.unet(tmp_path / "unet")
    cases: list[tuple[list[Any], str]] = [
        ([texts, "--base", old, "--kind", "lro"], "--kind"),
        ([texts, "--base", old, "--kind", "svdiff", "--rank", 4], "has no rank"),
        ([texts, "--base", old, "--kind", "ia3", "--rank", 4], "has no rank"),
        ([texts, "--base", old, "--set", "nonsense=1"], "nonsense"),
        ([texts, "--base", old, "--targets", "to_nothing"], "to_nothing"),
        ([texts, "--base", old, "--kind", "lorax", "--set", "r=4000"], "4000"),
        ([texts, "--base", old, "--kind", "svdiff", "--quantize", "8bit"], "quantize"),
        ([texts, "--base", bert], "no causal language model"),
        ([pictures, "--base", unet], "pipeline's folder"),
        ([tmp_path / "nothing", "--base", old], "no such file"),
        ([broken, "--base", old], "no .txt"),
        ([texts, "--base", pipe], "no pictures"),
        ([broken, "--base", pipe, "--caption", "x"], "a.png"),
        ([edited(tmp_path / "a.jsonl", '{"x": 1}'), "--base", old], "line 1"),
        ([edited(tmp_path / "b.jsonl", "{"), "--base", old], "no JSON"),
        ([edited(tmp_path / "c.jsonl", '{"messages": [{"role": "user"}]}'), "--base", old], "messages"),
        ([edited(tmp_path / "d.txt", ""), "--base", old, "--held-out", 0.5], "no text"),
        ([pictures, "--base", pipe, "--size", 13], "multiple"),
        ([texts, "--base", old, "--held-out", 1], "held out"),
        ([edited(tmp_path / "e.jsonl", "[" * 20000), "--base", old], "no JSON"),
        ([texts, "--base", old, "--set", "rank_pattern=5"], "--set"),
        ([texts, "--base", old, "--set", "layer_replication=[[0,9]]"], "--set"),
        ([texts, "--base", old, "--set", "inference_mode=true"], "nothing of the adapter is trained"),
        ([texts, "--base", old, "--set", "init_lora_weights=loftq"], "LoftQ"),
        ([texts, "--base", old, "--set", "init_lora_weights=lora_ga"], "LoRA-GA"),
        ([texts, "--base", old, "--set", 'kasa_config={"beta": 0.1}'], "KaSA"),
    ]
    for number, (arguments, said) in enumerate(cases):
        out = tmp_path / f"out{number}"
        result = run("train", *map(str, arguments), "-o", str(out), "--steps", "1")
        assert (result.code in (1, 2), said in result.err) == (True, True), (arguments, result.err)
        assert (len(result.err.strip().splitlines()), out.exists()) == (1, False), arguments


@pytest.mark.parametrize(
    ("option", "value"),
    [("--cut-mix", 0.6), ("--unmix", 1), ("--prior", 0), ("--fit", "crop"), ("--phrase", "one={0}")],
)
def test_what_is_for_subjects_is_not_passed_over_without_any(
    option: str, value: Any, texts: Path, old: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    result = run("train", str(texts), "--base", str(old), "-o", str(out), option, str(value))
    assert (result.code, out.exists()) == (2, False)
    assert f"{option} is for subjects" in result.err
    assert "Give --subject with it" in result.err


def test_a_picture_without_a_caption_is_named(pictures: Path, pipe: Path, tmp_path: Path) -> None:
    place = tmp_path / "some"
    place.mkdir()
    Image.new("RGB", (16, 16)).save(place / "lone.png")
    with pytest.raises(InputError, match=r"lone\.png.*has no caption"):
        made(place, pipe, tmp_path / "out")
    made(place, pipe, tmp_path / "out", replace(QUICK, caption="rain", steps=1))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_no_number_stops_it_at_the_last_good_state(
    where: str, texts: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = TextLesson.loss
    seen: list[int] = []

    def spoilt(self: TextLesson, model: Any, which: Any, generator: Any) -> Tensor:
        seen.append(len(seen))
        found = loss(self, model, which, generator)
        if len(seen) <= 2:
            return found
        if where == "loss":
            return found * float("nan")
        # Its value is 0, its gradient infinite.
        return found + (found - found.detach()).abs().sqrt()

    monkeypatch.setattr(TextLesson, "loss", spoilt)
    report = made(texts, old, tmp_path / "out")
    assert "no number at step 3" in report.stopped
    assert (len(seen), report.steps) == (3, 2)
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())
    assert any(value.abs().sum() > 0 for name, value in weights(tmp_path / "out").items() if name.endswith("up"))
    seen[:] = [0, 1, 2]
    with pytest.raises(InputError, match="not a number"):
        made(texts, old, tmp_path / "none")


def test_a_budget_leaves_a_state_to_go_on_from(texts: Path, old: Path, tmp_path: Path) -> None:
    short = replace(QUICK, budget=1e-6)
    report = made(texts, old, tmp_path / "short", short)
    assert (report.steps, "budget" in report.stopped) == (1, True)
    assert state_file(texts, open_base(old), QUICK).is_file()
    made(texts, old, tmp_path / "short", QUICK, overwrite=True)
    made(texts, old, tmp_path / "whole", QUICK)
    one, other = weights(tmp_path / "short"), weights(tmp_path / "whole")
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_kinds_are_written_as_the_folder_has_them(
    kind: str, pictures: Path, pipe: Path, tmp_path: Path
) -> None:
    made(pictures, pipe, tmp_path / "file.safetensors", quick(kind))
    made(pictures, pipe, tmp_path / "v1.5-folder", quick(kind))
    file, folder = load_adapter(tmp_path / "file.safetensors"), load_adapter(tmp_path / "v1.5-folder")
    assert (file.format, folder.format) == ("lycoris", "peft")
    mine = {ref.path: update.delta() for ref, update in file.updates.items()}
    assert len(mine) == len(folder.updates)
    by_name = {path.replace(".", "_"): delta for path, delta in mine.items()}
    for ref, update in folder.updates.items():
        torch.testing.assert_close(by_name[ref.path.replace(".", "_")], update.delta(), rtol=1e-4, atol=1e-6)


def test_olora_is_written_for_the_base_as_it_was(texts: Path, old: Path, tmp_path: Path) -> None:
    import peft

    made(texts, old, tmp_path / "out", quick("lora", options={"init_lora_weights": "olora"}))
    base = load_model(old).main
    served = logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval())
    merged = load_model(old)
    with applied(merged.components, load_adapter(tmp_path / "out")):
        torch.testing.assert_close(logits(merged.main), served, rtol=1e-3, atol=1e-4)


def test_alpha_goes_by_the_rank_however_that_was_given() -> None:
    assert config_of("lora", rank=4).lora_alpha == 4
    assert config_of("lora", options={"r": 4}).lora_alpha == 4
    assert config_of("lora", rank=4, alpha=2.5).lora_alpha == 2.5


def test_a_layer_outside_of_the_blocks_is_not_taken_with_them() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = torch.nn.ModuleDict({"to_q": torch.nn.Linear(2, 2), "add_q_proj": torch.nn.Linear(2, 2)})
            self.transformer_blocks = torch.nn.ModuleList([block])
            self.proj_out = torch.nn.Linear(2, 2)

    assert default_targets(Net(), "lora", denoiser=True) == ("to_q", "add_q_proj")


def test_a_phone_s_picture_is_turned_upright(pipe: Path, tmp_path: Path) -> None:
    from regraft.training.picture_data import _pixels

    lying = Image.new("RGB", (16, 16), (255, 0, 0))
    lying.paste((0, 0, 255), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3
    lying.save(tmp_path / "a.png", exif=exif)
    found = _pixels(load_model(pipe), [tmp_path / "a.png"], 16, 16)
    torch.testing.assert_close(found[0, :, 12, 8], torch.tensor([-1.0, -1.0, 1.0]))


def test_lines_end_at_line_feeds_alone(old: Path, tmp_path: Path) -> None:
    line = json.dumps({"text": "the rain\u2028is in the river"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert len(read_examples(tmp_path / "a.jsonl", load_model(old), 32)) == 2


def test_another_precision_may_follow_in_one_process(texts: Path, old: Path, tmp_path: Path) -> None:
    made(texts, old, tmp_path / "one", replace(QUICK, steps=1))
    made(texts, old, tmp_path / "two", replace(QUICK, steps=1, precision="bf16"))


def test_nothing_is_replaced_unasked(texts: Path, old: Path, tmp_path: Path) -> None:
    made(texts, old, tmp_path / "out", replace(QUICK, steps=1))
    with pytest.raises(OutputError, match="exists already"):
        made(texts, old, tmp_path / "out", replace(QUICK, steps=1))
    made(texts, old, tmp_path / "out", replace(QUICK, steps=1), overwrite=True)


def test_the_command_tells_its_record(texts: Path, old: Path, tmp_path: Path, run: Run) -> None:
    result = run("train", texts, "--base", old, "-o", tmp_path / "out", "--steps", "4", "--rank", "2", "--json")
    assert result.code == 0, result.err
    record = TrainReport.model_validate_json(result.out)
    assert record.kind == "lora"
    assert record.steps == 4
    assert record.outputs == [str(tmp_path / "out")]
    shown = run("lineage", "show", tmp_path / "out")
    assert open_base(old).fingerprint in shown.out
