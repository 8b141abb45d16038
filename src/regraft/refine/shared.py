"""Whether two bases share an output space: tokens, or latents and what is predicted of them."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.probes.batches import other_tokens
from regraft.probes.diffusion import reads
from regraft.runtime.both import BothModels
from regraft.runtime.latents import Latents
from regraft.runtime.load import Loaded

# Autoencoders whose latents of a picture differ by less, relative to their size, share a space: the same weights in
# half precision, or a decoder that alone was trained on.
_SAME_LATENTS = 0.02


@torch.no_grad()
def unshared(models: BothModels) -> str:
    """Why the outputs of two bases can't be compared one by one; empty where they can.

    Raises:
        InputError: their vocabularies differ, and there are no tokenizers to tell how.
    """
    old, new = models.old, models.new
    if old.kind == "language":
        return "the two bases split text into different tokens" if other_tokens(old, new) else ""
    if old.kind == "denoiser" and old.pipeline is not None and new.pipeline is not None:
        return _unshared_latents(old, new)
    return ""


def _unshared_latents(old: Loaded, new: Loaded) -> str:
    channels = [getattr(model.main.config, "in_channels", None) for model in (old, new)]
    if channels[0] != channels[1]:
        return f"the old base's latents have {channels[0]} channels, the new one's {channels[1]}"
    if reads(old) != reads(new):
        return f"the old base predicts {reads(old)[0]}, the new one {reads(new)[0]}"
    if not all(_draws(model) for model in (old, new)):
        return ""
    size = 8 * max(model.pipeline.vae_scale_factor for model in (old, new))
    ours, theirs = (Latents(model).encode(_test_pictures(size)).cpu() for model in (old, new))
    if ours.shape != theirs.shape:
        return f"the old base's latents of a picture are {_size(ours)}, the new one's {_size(theirs)}"
    # Measured, not told by the weights: a decoder alone may have been trained on, or a precision be another.
    far = float((ours - theirs).norm() / ours.norm().clamp_min(1e-12))
    return f"the autoencoders differ: their latents of the same pictures are {far:.0%} apart" * (far > _SAME_LATENTS)


def _draws(model: Loaded) -> bool:
    return getattr(model.pipeline, "vae", None) is not None


def _test_pictures(size: int) -> Tensor:
    """Smooth random pictures, (4, 3, size, size), from −1 to 1."""
    rough = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(rough, size=(size, size), mode="bicubic").tanh()


def _size(latents: Tensor) -> str:
    return " × ".join(str(n) for n in latents.shape[1:])
