"""Several subjects are trained at once, as `regraft train` does it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from running import Run

from regraft import InputError, UsageError, load_adapter, open_base
from regraft.errors import RegraftError
from regraft.runtime import load_model
from regraft.training import TrainSettings, state_file, train
from regraft.training.settings import SubjectFolder, SubjectSettings
from regraft.training.subjects import SubjectLesson, subject_lesson
from regraft.training.unmix import Apart, recorded_attention, unmix_loss
from verify import tiny

#: The tiny tokenizer spells every word and reads 14 letters.
SHORT = {"one": "{0}", "both": "{0} {1}", "beside": "{0} l {1} r", "above": "{0} t {1} b"}


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Path:
    return tiny.pipeline(folder / "pipe")


@pytest.fixture(scope="module")
def asked(folder: Path) -> SubjectSettings:
    """A red one and a blue one."""
    folders = []
    for identifier, noun, colour in (("q", "cat", (255, 0, 0)), ("z", "dog", (0, 0, 255))):
        place = folder / noun
        place.mkdir()
        for at in range(3):
            Image.new("RGB", (24, 18 + at), colour).save(place / f"{at}.png")
        folders.append(SubjectFolder(place, identifier, noun))
    return SubjectSettings(tuple(folders), phrases=SHORT)


def settings(asked: SubjectSettings, **more: Any) -> TrainSettings:
    return replace(TrainSettings(subjects=asked, steps=4, look=2, rank=2, rate=1e-2, batch=3, dropped=0.0), **more)


def losses(model: Any, lesson: SubjectLesson, seed: int = 5) -> torch.Tensor:
    return lesson.loss(model, range(6), torch.Generator().manual_seed(seed))


def test_subjects_are_trained_and_their_names_are_in_the_file(
    asked: SubjectSettings, pipe: Path, tmp_path: Path
) -> None:
    from regraft.refine.prompting import picture_prompts

    wanted = settings(replace(asked, unmix=1.0, prior=2))
    report = train(None, open_base(pipe), tmp_path / "a.safetensors", wanted)
    assert (report.steps, report.unit, report.learnt) == (4, "pictures", 6)
    assert all(str(one.folder) in report.data for one in asked.folders)
    prompts, _ = picture_prompts(load_adapter(tmp_path / "a.safetensors"), None)
    assert {"q cat", "z dog"} <= set(prompts)


def test_pictures_are_cropped_to_what_the_pipeline_draws(asked: SubjectSettings, pipe: Path) -> None:
    lesson = subject_lesson(load_model(pipe), asked, None, 0.0, 0)
    red, blue = (subject.pictures for subject in lesson.draws.subjects)
    assert red.shape == blue.shape == (3, 3, 16, 16)
    for pictures, colour in ((red, (1.0, -1.0, -1.0)), (blue, (-1.0, -1.0, 1.0))):
        assert torch.allclose(pictures, torch.tensor(colour)[:, None, None].expand_as(pictures))


def test_the_regulariser_and_the_prior_add_to_the_loss(asked: SubjectSettings, pipe: Path) -> None:
    model = load_model(pipe)
    plain = subject_lesson(model, asked, None, 0.0, 0)
    without, once, twice = (float(losses(model, replace(plain, unmix=weight))) for weight in (0.0, 1.0, 2.0))
    assert once > without
    assert twice - without == pytest.approx(2 * (once - without), rel=1e-3)
    prior = subject_lesson(model, replace(asked, prior=2), None, 0.0, 0)
    assert prior.prior is not None
    assert float(losses(model, prior)) > without
    # What is shown without a prompt names no one.
    silent = replace(plain, dropped=1.0)
    assert float(losses(model, replace(silent, unmix=9.0))) == pytest.approx(float(losses(model, silent)))


def test_the_prior_is_what_the_base_draws_of_the_class(asked: SubjectSettings, pipe: Path) -> None:
    model = load_model(pipe)
    lesson = subject_lesson(model, replace(asked, prior=1), None, 0.0, 7)
    assert lesson.prior is not None
    cat, dog = lesson.prior.subjects
    for at, subject in enumerate((cat, dog)):
        drawn = model.pipeline(
            subject.noun,
            num_inference_steps=20,
            generator=torch.Generator().manual_seed(7 + 1000 * at),
            output_type="pt",
        ).images
        assert torch.allclose(subject.pictures, drawn * 2 - 1, atol=1e-5)
    assert not torch.allclose(cat.pictures, dog.pictures)


def test_training_with_unmix_lowers_the_attention_to_the_other(asked: SubjectSettings, pipe: Path) -> None:
    import peft

    left = {}
    for weight in (0.0, 100.0):
        model = load_model(pipe)
        lesson = subject_lesson(model, replace(asked, unmix=weight, cut_mix=1.0), None, 0.0, 0)
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model.main, peft.LoraConfig(r=4, target_modules=["to_q", "to_k"]))
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=3e-2)
        for step in range(15):
            optimizer.zero_grad()
            losses(model, lesson, step).backward()
            optimizer.step()
        samples = [lesson.draws.draw(torch.Generator().manual_seed(seed)) for seed in range(6)]
        words = model.pipeline.encode_prompt([sample.prompt for sample in samples], "cpu", 1, False)[0]
        with recorded_attention(model.main) as maps, torch.no_grad():
            noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
            model.main(noise, torch.full((6,), 500), words)
        left[weight] = float(unmix_loss(maps, Apart.of(samples, model.pipeline.tokenizer), (8, 8)))
    assert left[100.0] < 0.7 * left[0.0]


def test_a_run_that_was_stopped_is_told_from_one_of_other_pictures(asked: SubjectSettings, pipe: Path) -> None:
    base = open_base(pipe)
    first, again = (state_file(None, base, settings(asked)) for _ in range(2))
    assert first == again
    assert state_file(None, base, settings(replace(asked, unmix=1.0))) != first
    assert state_file(None, base, settings(replace(asked, folders=asked.folders[:1]))) != first


@pytest.mark.parametrize(
    ("subjects", "others", "kind", "how"),
    [
        ({"unmix": 1.0}, {"checkpointing": True}, UsageError, "gradient checkpointing"),
        ({"phrases": {"beside": "{0} by"}}, {}, UsageError, r"must hold \{0\} and \{1\}"),
        ({"phrases": {"below": "{0} {1}"}}, {}, UsageError, "no such phrase: below. Known: one,"),
        ({"phrases": {}, "unmix": 1.0}, {}, InputError, "special token 'z' is cut off"),
    ],
)
def test_what_can_t_be_taught_is_told(
    subjects: dict[str, Any],
    others: dict[str, Any],
    kind: type[RegraftError],
    how: str,
    asked: SubjectSettings,
    pipe: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=how):
        train(None, open_base(pipe), tmp_path / "out", settings(replace(asked, **subjects), **others))
    assert not (tmp_path / "out").exists()


def test_folders_that_can_t_be_taught_are_told(asked: SubjectSettings, pipe: Path) -> None:
    model, (first, second) = load_model(pipe), asked.folders
    for other, kind, how in (
        (None, UsageError, "at least 2 subjects, and there are 1. Give more"),
        (replace(second, folder=Path("none")), InputError, "none: has no pictures"),
        (replace(second, identifier="q"), InputError, "the special token 'q' is 2 times in the tokens"),
        (replace(second, identifier="q", noun="cat"), UsageError, "two subjects are called 'q cat'"),
    ):
        wanted = replace(asked, folders=(first, other) if other else (first,), unmix=1.0)
        with pytest.raises(kind, match=how):
            subject_lesson(model, wanted, None, 0.0, 0)


def test_either_data_or_subjects(asked: SubjectSettings, pipe: Path, old: Path, tmp_path: Path) -> None:
    for data, wanted in ((asked.folders[0].folder, settings(asked)), (None, TrainSettings())):
        with pytest.raises(UsageError, match="either data or subjects"):
            train(data, open_base(pipe), tmp_path / "out", wanted)
    with pytest.raises(InputError, match="subjects are learnt by a pipeline, not by a LlamaForCausalLM"):
        train(None, open_base(old), tmp_path / "out", settings(asked))


def test_the_command_takes_subjects(asked: SubjectSettings, pipe: Path, tmp_path: Path, run: Run) -> None:
    named = [f"--subject={one.folder}={one.identifier} {one.noun}" for one in asked.folders]
    said = [f"--phrase={name}={text}" for name, text in SHORT.items()]
    more = ["--steps", "2", "--batch", "2", "--rank", "2", "--unmix", "1", "--cut-mix", "1", "--fit", "whole"]
    found = run("train", "--base", str(pipe), "-o", str(tmp_path / "a.safetensors"), *named, *said, *more)
    assert found.code == 0, found.err
    assert (tmp_path / "a.safetensors").is_file()
    for text in ("mine", "mine=<v1>", "=<v1> cat"):
        refused = run("train", "--base", str(pipe), "-o", str(tmp_path / "b.safetensors"), "--subject", text)
        assert refused.code == 2
        assert "is no FOLDER=TOKEN NOUN" in refused.err


@pytest.mark.parametrize("more", [("--caption", "x"), ("--held-out", "0.1")], ids=lambda more: more[0])
def test_what_is_for_captioned_data_is_not_passed_over_with_subjects(
    more: tuple[str, str], asked: SubjectSettings, pipe: Path, tmp_path: Path, run: Run
) -> None:
    named = [f"--subject={one.folder}={one.identifier} {one.noun}" for one in asked.folders]
    refused = run("train", "--base", str(pipe), "-o", str(tmp_path / "a.safetensors"), *named, *more)
    assert (refused.code, list(tmp_path.iterdir())) == (2, [])
    assert f"{more[0]} is for DATA" in refused.err
