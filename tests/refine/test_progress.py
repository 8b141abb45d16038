"""What the progress line says of a look: loss, share and the time that is left."""

from __future__ import annotations

import pytest

from regraft.cli.refine import told
from regraft.refine import Look, RefineSettings
from regraft.refine.settings import settled


@pytest.mark.parametrize(
    ("budget", "left"),
    [(None, "at most 12 min left"), (100.0, "at most 40 s left"), (50.0, "at most 0 s left"), (7000.0, "12 min left")],
)
def test_the_time_left_is_that_of_the_steps_or_of_the_budget(budget: float | None, left: str) -> None:
    look = Look(step=20, loss=0.25, kept=None, seconds=60.0, learnt=0.5, most=260)
    said = told(look, RefineSettings(budget=budget))
    assert said.startswith("loss 0.500; 75.0% of what is wanted")
    assert said.endswith(left)


def test_before_the_first_step_there_is_no_loss_and_no_time() -> None:
    assert told(Look(0, 1.0, None, 1.0), RefineSettings()) == "0.0% of what is wanted, on held-out inputs"


@pytest.mark.parametrize(
    ("asked", "far", "texts", "wanted"),
    [
        (RefineSettings(), False, True, (240, None)),
        (RefineSettings(), True, True, (480, 768)),
        (RefineSettings(), True, False, (480, None)),
        (RefineSettings(steps=30, n_inputs=40), True, True, (30, 40)),
    ],
)
def test_from_afar_it_learns_longer_and_of_more_texts_unless_asked_otherwise(
    asked: RefineSettings, far: bool, texts: bool, wanted: tuple[int, int | None]
) -> None:
    found = settled(asked, far=far, texts=texts, sampled=False)
    assert (found.steps, found.n_inputs) == wanted


@pytest.mark.parametrize(
    ("texts", "sampled", "wanted"), [(True, True, 0.25), (True, False, 0.25), (False, False, 0.25), (False, True, 0.0)]
)
def test_pictures_that_are_learnt_are_not_unlearnt_unless_asked_for(texts: bool, sampled: bool, wanted: float) -> None:
    for asked, found in ((None, wanted), (0.4, 0.4)):
        settings = settled(RefineSettings(retention=asked), far=True, texts=texts, sampled=sampled)
        assert settings.retention == settings.kept == found
