"""The look that the demo's LoRAs teach, and a measure of it that needs no model.

*Cyano* is named after the cyanotype: dark blue paper, one pale ink. Every pixel of a styled picture
therefore lies on one straight line in RGB, from `PAPER` to `INK`, and how much of a picture lies
there can be read from its pixels alone. An ordinary emoji stays below 0.02, a styled one reaches 0.99.
"""

from __future__ import annotations

import numpy as np

PAPER = (0.04, 0.14, 0.33)
"""The dark end of the style's palette, RGB in [0, 1]."""

INK = (0.62, 0.95, 0.95)
"""The pale end of the style's palette, RGB in [0, 1]."""

# A pixel this near to the palette line is wholly of the style; from there its weight falls linearly to
# nothing at twice the distance. Just wide enough for the autoencoder's own error: true pictures of the
# style keep 0.999 through it. No background that the demo uses comes near the line.
_NEAR = 0.04


def style_share(images: np.ndarray) -> np.ndarray:
    """How much of each picture lies on the style's palette: (n, h, w, 3) in [0, 1] → (n,) in [0, 1].

    Each pixel is weighed by its Euclidean distance in RGB to the segment `PAPER`–`INK`; a picture's
    share is the mean over its pixels. Values outside [0, 1] are clipped first.

    >>> flat = np.broadcast_to(np.array(PAPER), (1, 32, 32, 3))
    >>> style_share(flat).tolist(), style_share(np.ones((1, 32, 32, 3))).tolist()
    ([1.0], [0.0])
    """
    pixels = np.asarray(images, dtype=np.float64)
    if pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"style_share wants pictures (n, h, w, 3), and got an array of shape {pixels.shape}")
    pixels = np.clip(pixels, 0.0, 1.0)
    paper, ink = np.array(PAPER), np.array(INK)
    along = ink - paper
    place = np.clip((pixels - paper) @ along / (along @ along), 0.0, 1.0)
    distance = np.linalg.norm(pixels - (paper + place[..., None] * along), axis=-1)
    weight = np.clip(2.0 - distance / _NEAR, 0.0, 1.0)
    shares: np.ndarray = weight.mean(axis=(1, 2))
    return shares
