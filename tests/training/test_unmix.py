"""The unmix regulariser: where special tokens stand, and what attention costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from regraft import InputError
from regraft.training.cutmix import CutMix, Phrases, Sample, Subject
from regraft.training.unmix import Apart, recorded_attention, token_positions, unmix_loss
from verify import tiny

SIZE, TOKENS = (8, 6), 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.clip_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def collages(count: int, *, seed: int = 0, probability: float = 1.0) -> list[Sample]:
    pictures = torch.zeros(1, 3, 16, 12)
    draws = CutMix([Subject(pictures, "q", "a"), Subject(pictures, "z", "b")], (16, 12), probability)
    generator = torch.Generator().manual_seed(seed)
    return [draws.draw(generator) for _ in range(count)]


def apart(regions: Sequence[int], tokens: tuple[int, int] = (1, 3)) -> Apart:
    """One collage on a map of as many positions in a row: 0 and 1 say whose each position is."""
    row = torch.tensor(regions, dtype=torch.float32)
    marks = torch.zeros(1, 2, TOKENS)
    marks[0, 0, tokens[0]] = marks[0, 1, tokens[1]] = 1.0
    return Apart(marks, torch.stack([row, 1 - row])[None, :, None, :])


def test_attention_to_the_own_region_alone_costs_nothing() -> None:
    target = apart([0, 0, 1, 1])
    own = torch.zeros(1, 2, 4, TOKENS)
    own[..., :2, 1] = own[..., 2:, 3] = 1.0
    # Where other tokens look is free.
    own[..., 0] = own[..., 4] = 0.7
    assert unmix_loss({"x": own}, target, (1, 4)) == 0
    assert unmix_loss({"x": own.flip(2)}, target, (1, 4)) == 1


def test_the_loss_is_the_mean_square_over_the_other_s_region() -> None:
    """Three positions of the one, one of the other; heads and layers count alike, whatever their size."""
    target = apart([0, 0, 0, 1])
    maps = {"small": torch.rand(1, 2, 4, TOKENS), "large": torch.rand(1, 5, 4, TOKENS)}
    expected = 0.0
    for found in maps.values():
        one, two = found[0, :, 3:, 1].square().mean(), found[0, :, :3, 3].square().mean()
        expected += float(one + two) / 4
    assert unmix_loss(maps, target, (1, 4)) == pytest.approx(expected)


def test_samples_that_are_no_collage_do_not_count(tokenizer: Any) -> None:
    samples = [sample for sample in collages(40, probability=0.5) if sample.is_collage][:2]
    plain = next(sample for sample in collages(40, probability=0.5) if not sample.is_collage)
    class_pictures = [torch.zeros(1, 3, 16, 12)] * 2
    draws = CutMix([Subject(class_pictures[0], "q", "a"), Subject(class_pictures[0], "z", "b")], (16, 12), 1.0)
    prior = draws.of_classes(class_pictures).draw(torch.Generator().manual_seed(0))
    assert prior.is_collage
    maps = {"x": torch.rand(4, 2, 48, 60)}
    mixed = unmix_loss(maps, Apart.of([samples[0], plain, prior, samples[1]], tokenizer, 60), SIZE)
    alone = unmix_loss({"x": maps["x"][[0, 3]]}, Apart.of(samples, tokenizer, 60), SIZE)
    assert mixed == pytest.approx(float(alone))
    assert alone > 0
    none = unmix_loss({"x": maps["x"][1:3]}, Apart.of([plain, prior], tokenizer, 60), SIZE)
    assert none == 0


def test_masks_come_down_to_the_resolution_of_each_map(tokenizer: Any) -> None:
    """8 × 6 latents of 16 × 12 pictures, and a map of a level below; the left half must be the left half of both."""
    (sample,) = collages(1, seed=next(seed for seed in range(20) if "on the left" in collages(1, seed=seed)[0].prompt))
    target = Apart.of([sample], tokenizer, 40)
    first = int(target.tokens[0, 0].argmax())
    for height, width in (SIZE, (4, 3)):
        at = torch.zeros(1, 1, height, width, 40)
        at[..., : width // 2, first] = 1.0
        assert unmix_loss({"x": at.flatten(2, 3)}, target, SIZE) == 0
        at[..., -(width // 2) :, first] = 1.0
        assert unmix_loss({"x": at.flatten(2, 3)}, target, SIZE) > 0.2
    with pytest.raises(InputError, match="x: its 7 positions are no picture"):
        unmix_loss({"x": torch.rand(1, 1, 7, 40)}, target, SIZE)


def test_special_tokens_are_found_where_they_stand(tokenizer: Any) -> None:
    ids = tokenizer("a cat q dog").input_ids
    assert token_positions(tokenizer, "a cat q dog", "q") == [ids.index(tokenizer.convert_tokens_to_ids("q</w>"))]
    several = token_positions(tokenizer, "a cat sks dog", "sks")
    whole = tokenizer("a cat sks dog").input_ids
    assert tokenizer.convert_ids_to_tokens([whole[at] for at in several]) == ["s", "k", "s</w>"]


def test_each_collage_s_tokens_keep_out_of_the_other_s_region(tokenizer: Any) -> None:
    samples = collages(8)
    target = Apart.of(samples, tokenizer, 60)
    for at, sample in enumerate(samples):
        ids = tokenizer(sample.prompt).input_ids
        for which, subject in enumerate(sample.subjects):
            word = tokenizer.convert_ids_to_tokens(ids[int(target.tokens[at, which].argmax())])
            assert word == f"{subject.identifier}</w>"
            assert target.tokens[at, which].sum() == 1
            assert torch.equal(target.others[at, which].bool(), ~sample.regions[which])


@pytest.mark.parametrize(
    ("prompt", "identifier", "how"),
    [
        ("a cat", "q", "is not in the tokens"),
        ("a q cat and a q dog", "q", "is 2 times in the tokens"),
        ("a cat and a q", "", "is not in the tokens"),
        ("abcdefghijklm q", "q", "is cut off: .* has 16 tokens, and 15 are read"),
        ("abcdefghijkl sks", "sks", "is cut off"),
    ],
)
def test_special_tokens_that_are_not_there_are_told(tokenizer: Any, prompt: str, identifier: str, how: str) -> None:
    with pytest.raises(InputError, match=how):
        token_positions(tokenizer, prompt, identifier, 15)


def test_looking_up_a_long_prompt_warns_of_nothing(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert token_positions(tokenizer, "q " + "abcdefgh " * 5, "q") == [1]
    assert not caplog.records


def test_the_demo_s_base_is_recorded() -> None:
    """The shipped v1: a CLIP text encoder with two words more, and a LoRA."""
    from regraft.demo import data_folder
    from regraft.runtime import load_model

    loaded = load_model(data_folder() / "v1")
    pipe = loaded.pipeline
    pipe.tokenizer.add_tokens(["<v1>", "<v2>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    pictures = torch.zeros(1, 3, 32, 32)
    phrases = Phrases("{0}", "{0} and {1}", "{0} left {1} right", "{0} top {1} bottom")
    draws = CutMix([Subject(pictures, "<v1>", "cat"), Subject(pictures, "<v2>", "dog")], (32, 32), 1.0, phrases=phrases)
    samples = [draws.draw(torch.Generator().manual_seed(seed)) for seed in range(3)]
    ids = pipe.tokenizer(
        [sample.prompt for sample in samples], padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids
    with recorded_attention(loaded.main) as maps:
        loaded.main(torch.randn(3, 8, 16, 16), torch.tensor([10, 500, 900]), pipe.text_encoder(ids)[0])
    assert {found.shape[2] for found in maps.values()} == {256, 64, 16}
    assert 0 < unmix_loss(maps, Apart.of(samples, pipe.tokenizer), (16, 16)) < 1
