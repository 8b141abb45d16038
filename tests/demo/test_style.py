"""What `style_share` claims about a picture, on pictures made here from plain numbers."""

from __future__ import annotations

import numpy as np
import pytest

from regraft.demo.style import INK, PAPER, style_share


def solid(colour: tuple[float, float, float]) -> np.ndarray:
    return np.broadcast_to(np.array(colour), (1, 32, 32, 3)).copy()


def blueprint(rng: np.random.Generator, count: int = 4) -> np.ndarray:
    """Pictures whose pixels are arbitrary mixtures of paper and ink."""
    ink = rng.random((count, 32, 32, 1))
    return np.array(PAPER) * (1 - ink) + np.array(INK) * ink


def test_every_mixture_of_paper_and_ink_is_wholly_of_the_style():
    assert style_share(blueprint(np.random.default_rng(0))) == pytest.approx(np.ones(4))


@pytest.mark.parametrize(
    "colour",
    [(1, 1, 1), (0.8, 0.8, 0.8), (0, 0, 0), (1, 0.78, 0.85), (0.76, 0.93, 0.72), (0.66, 0.78, 1), (0.9, 0.1, 0.1)],
    ids=["white", "grey", "black", "pink", "green", "blue", "red"],
)
def test_plain_colours_and_the_demo_s_backgrounds_are_not_of_the_style(colour):
    assert style_share(solid(colour)).item() < 0.05


def test_the_line_ends_at_paper_and_ink():
    """A colour that only the line's extension reaches does not count."""
    beyond = np.array(PAPER) - 0.5 * (np.array(INK) - np.array(PAPER))
    assert style_share(solid(tuple(np.clip(beyond, 0, 1)))).item() < 0.05


def test_half_a_styled_picture_counts_half():
    picture = solid(PAPER)
    picture[:, :, 16:] = 1.0
    assert style_share(picture).item() == pytest.approx(0.5)


def test_share_falls_steadily_with_noise_and_survives_a_little():
    rng = np.random.default_rng(1)
    clean = blueprint(rng)
    noise = rng.standard_normal(clean.shape)
    shares = [style_share(clean + sigma * noise).mean() for sigma in (0.0, 0.01, 0.03, 0.1, 0.3)]
    assert shares == sorted(shares, reverse=True)
    assert shares[1] > 0.98
    assert shares[-1] < 0.2


def test_pictures_are_judged_one_by_one():
    pictures = np.concatenate([solid(PAPER), solid((1, 1, 1)), solid(INK)])
    assert style_share(pictures).tolist() == pytest.approx([1.0, 0.0, 1.0])


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 3, 32, 32)])
def test_other_layouts_are_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"\(n, h, w, 3\)"):
        style_share(np.zeros(shape))
