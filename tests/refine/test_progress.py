"""What the progress line says of a look: loss, share and the time that is left."""

from __future__ import annotations

import pytest

from regraft.cli.refine import told
from regraft.refine import Look, RefineSettings


@pytest.mark.parametrize(
    ("budget", "left"),
    [(None, "at most 12 min left"), (100.0, "at most 40 s left"), (50.0, "at most 0 s left"), (7000.0, "12 min left")],
)
def test_the_time_left_is_that_of_the_steps_or_of_the_budget(budget: float | None, left: str) -> None:
    look = Look(step=20, loss=0.25, kept=None, seconds=60.0, learnt=0.5)
    said = told(look, RefineSettings(steps=260, budget=budget))
    assert said.startswith("loss 0.500; 75.0% of what is wanted")
    assert said.endswith(left)


def test_before_the_first_step_there_is_no_loss_and_no_time() -> None:
    assert told(Look(0, 1.0, None, 1.0), RefineSettings()) == "0.0% of what is wanted, on held-out inputs"
