from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pytest

from regraft.probes.pictures import png


def _pixels(data: str) -> np.ndarray:
    from matplotlib.image import imread

    return imread(BytesIO(base64.b64decode(data)), format="png")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_picture_in_eight_bits(channels: int) -> None:
    image = np.random.default_rng(0).random((5, 7, channels), dtype=np.float32)
    pixels = _pixels(png(image))
    assert pixels.shape[:2] == (5, 7)
    assert np.abs(pixels[..., :3] - image).max() < 0.51 / 255
