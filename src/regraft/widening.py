"""Input layers that a new base widened: channels added at the end (inpainting, control, image to video).

An update is ported by channel: on the inputs that both bases have it is a copy, and the added ones stay the base's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.nearness import similarity
from regraft.tensors import Shape
from regraft.transport import IDENTITY, LinearMap, Transport

# Below this, the inputs that both have are not the same ones: hidden layers of another width are such.
_SAME_INPUTS = 0.5


def widened(old: Tensor, new: Tensor) -> Transport | None:
    """The copy onto a weight with inputs added at its end; None where the weights don't say that it is one.

    Args:
        old: (out, in), float32; kernels flattened.
        new: (out, in'), likewise.
    """
    if not widens(tuple(old.shape), tuple(new.shape)) or similarity(old, new[:, : old.shape[1]]) < _SAME_INPUTS:
        return None
    return Transport(((IDENTITY, LinearMap(0.0, torch.eye(old.shape[1], new.shape[1], device=new.device))),))


def widens(old: Shape, new: Shape) -> bool:
    """Whether a weight of shape ``new`` (out, in', …) is one of shape ``old`` (out, in, …) with more inputs."""
    return len(old) == len(new) > 1 and (new[0], new[2:]) == (old[0], old[2:]) and new[1] > old[1]
