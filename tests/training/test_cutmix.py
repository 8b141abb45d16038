"""Collages of two subjects: pictures, regions, prompts and how often."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft import InputError
from regraft.errors import UsageError
from regraft.training.cutmix import Cut, CutMix, Fit, Phrases, Sample, Subject, collage, fitted

SIZE = (12, 10)
#: Each subject is of one grey, so that a pixel tells whose it is.
GREYS = {"<v1> dog": -0.8, "<v2> cat": 0.1, "<v3> cat": 0.9}


def of(grey: float, *, size: tuple[int, int] = (9, 14), count: int = 2) -> Tensor:
    return torch.full((count, 3, *size), grey)


def subjects() -> list[Subject]:
    return [Subject(of(grey), *name.split()) for name, grey in GREYS.items()]


def drawn(draws: CutMix, count: int, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [draws.draw(generator) for _ in range(count)]


@pytest.mark.parametrize("fit", ["crop", "whole"])
def test_every_pixel_is_of_the_subject_whose_region_it_is_in(fit: Fit) -> None:
    for sample in drawn(CutMix(subjects(), SIZE, 1.0, fit), 40):
        assert sample.picture.shape == (3, *SIZE)
        assert torch.equal(sample.regions.sum(0), torch.ones(SIZE, dtype=torch.long))
        for subject, region in zip(sample.subjects, sample.regions, strict=True):
            assert torch.allclose(sample.picture[:, region], torch.tensor(GREYS[subject.name]))


def test_prompts_name_each_side_s_subject() -> None:
    seen = set()
    for sample in drawn(CutMix(subjects(), SIZE, 1.0), 60):
        grey = {round(value, 3): name for name, value in GREYS.items()}
        left, right, top, bottom = (
            grey.get(round(float(sample.picture[0, row, column]), 3))
            for row, column in ((6, 0), (6, 9), (0, 5), (11, 5))
        )
        beside = f"photo of a {left} on the left and a {right} on the right"
        above = f"photo of a {top} at the top and a {bottom} at the bottom"
        first, second = (left, right) if left != right else (top, bottom)
        plain = f"photo of a {first} and a {second}"
        allowed = {beside if left != right else above: "sides", plain: "plain"}
        assert sample.prompt in allowed
        seen.add((allowed[sample.prompt], left != right))
    assert seen == {(kind, beside) for kind in ("sides", "plain") for beside in (True, False)}


@pytest.mark.parametrize(("cut", "word"), [("beside", "left"), ("above", "top")])
def test_collages_are_cut_as_asked(cut: Cut, word: str) -> None:
    samples = drawn(CutMix(subjects(), SIZE, 1.0, cuts=(cut,)), 20)
    assert all(bool(sample.regions[0, :, 0].all()) == (cut == "beside") for sample in samples)
    assert {word in sample.prompt for sample in samples if " the " in sample.prompt} == {True}


def test_a_collage_is_drawn_as_often_as_it_should_be() -> None:
    for probability in (0.0, 0.25, 0.6, 1.0):
        share = sum(sample.is_collage for sample in drawn(CutMix(subjects(), SIZE, probability), 800)) / 800
        # Four standard deviations of 800 draws.
        assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / 800) ** 0.5)


def test_the_probability_is_the_paper_s_by_default() -> None:
    assert CutMix(subjects(), SIZE).probability == 0.6


def test_two_of_a_collage_differ_and_all_pairs_are_drawn() -> None:
    pairs = {tuple(subject.name for subject in sample.subjects) for sample in drawn(CutMix(subjects(), SIZE, 1.0), 200)}
    assert pairs == {(one, two) for one in GREYS for two in GREYS if one != two}


def test_a_plain_sample_is_one_subject_everywhere() -> None:
    for sample in drawn(CutMix(subjects(), SIZE, 0.0), 10):
        (subject,) = sample.subjects
        assert sample.prompt == f"photo of a {subject.name}"
        assert sample.regions.shape == (1, *SIZE)
        assert sample.regions.all()
        assert torch.allclose(sample.picture, torch.tensor(GREYS[subject.name]))


def test_the_same_seed_draws_the_same() -> None:
    first, again, other = (drawn(CutMix(subjects(), SIZE), 20, seed) for seed in (1, 1, 2))
    assert [sample.prompt for sample in first] == [sample.prompt for sample in again]
    assert all(torch.equal(one.picture, two.picture) for one, two in zip(first, again, strict=True))
    assert [sample.prompt for sample in first] != [sample.prompt for sample in other]


def test_prior_samples_are_made_the_same_way_of_the_classes() -> None:
    draws = CutMix(subjects(), SIZE, 1.0, phrases=Phrases(both="{0} & {1}", beside="{0} | {1}", above="{0} / {1}"))
    prior = draws.of_classes([of(-0.5), of(0.5), of(0.7)])
    samples = drawn(prior, 40)
    assert {sample.prompt for sample in samples} == {
        text.format(*pair)
        for text in ("{0} & {1}", "{0} | {1}", "{0} / {1}")
        for pair in (("dog", "cat"), ("cat", "dog"))
    }
    greys = {"dog": -0.5, "cat": 0.5}
    for sample in samples:
        for subject, region in zip(sample.subjects, sample.regions, strict=True):
            assert torch.allclose(sample.picture[:, region], torch.tensor(greys[subject.noun]))


def test_subjects_of_one_class_have_plain_prior_samples() -> None:
    prior = CutMix(subjects()[1:], SIZE).of_classes([of(0.5), of(0.7)])
    assert {sample.prompt for sample in drawn(prior, 20)} == {"photo of a cat"}


@pytest.mark.parametrize(("size", "beside", "halves"), [((8, 7), True, (3, 4)), ((7, 8), False, (3, 4))])
def test_an_odd_side_is_cut_into_halves_that_differ_by_one(
    size: tuple[int, int], beside: bool, halves: tuple[int, int]
) -> None:
    picture, regions = collage(of(-1.0)[0], of(1.0)[0], size, beside=beside)
    assert picture.shape == (3, *size)
    assert regions.sum((1, 2)).tolist() == [8 * half for half in halves]
    assert torch.equal(picture[0] < 0, regions[0])


def test_crop_covers_and_whole_contains() -> None:
    """A picture with a frame: whole keeps all of the frame, crop loses it on two sides; neither distorts."""
    picture = torch.zeros(3, 16, 16)
    picture[:, 4:12, 4:12] = 1.0
    cropped, whole = fitted(picture, (16, 8), "crop"), fitted(picture, (16, 8), "whole")
    assert torch.equal(cropped, picture[:, :, 4:12])
    assert torch.equal(whole[:, 4:12], fitted(picture, (8, 8), "whole"))
    assert torch.equal(whole[:, :4], whole[:, 4:5].expand(3, 4, 8))
    inside = whole[0] > 0.5
    assert (int(inside.any(1).sum()), int(inside.any(0).sum())) == (4, 4)


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    picture = torch.rand(3, 5, 6)
    assert torch.equal(fitted(picture, (5, 6), "crop"), picture)
    assert torch.equal(fitted(picture, (5, 6), "whole"), picture)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_probability_beyond_0_and_1_is_refused(probability: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        CutMix(subjects(), SIZE, probability)


def test_too_few_subjects_or_one_name_twice_are_refused() -> None:
    one = subjects()[0]
    with pytest.raises(UsageError, match="at least 2 subjects, and there are 1"):
        CutMix([one], SIZE)
    assert CutMix([one], SIZE, 0.0).draw(torch.Generator()).prompt == "photo of a <v1> dog"
    with pytest.raises(UsageError, match="at least 1 subjects, and there are 0"):
        CutMix([], SIZE, 0.0)
    with pytest.raises(UsageError, match="two subjects are called '<v1> dog'"):
        CutMix([one, one], SIZE)
    with pytest.raises(UsageError, match="can't be cut in two"):
        CutMix(subjects(), (1, 8))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (0, 3, 8, 8)])
def test_pictures_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"<v1> dog: has pictures of shape"):
        Subject(torch.zeros(shape), "<v1>", "dog")
