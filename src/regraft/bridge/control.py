"""A ControlNet on a denoiser for a while: whoever runs the denoiser then runs both."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regraft.errors import InputError, first_line
from regraft.runtime.classes import read_config
from regraft.runtime.libraries import library, quiet_libraries
from regraft.runtime.load import Loaded


@dataclass(frozen=True)
class Control:
    """A ControlNet and what it goes by.

    Attributes:
        net: diffusers' model.
        image: (pictures, channels, height, width), from 0 to 1.
        scale: of what it adds.
    """

    net: Any
    image: Tensor
    scale: float

    @classmethod
    def of(cls, net: Any, model: Loaded, image: Any, n: int, shape: tuple[int, int], scale: float) -> Control:
        """Bring images to the size of a base's pictures.

        Args:
            net: a ``ControlNetModel`` of diffusers for the base.
            model: the base.
            image: one or one per picture: PIL, arrays or tensors from 0 to 1.
            n: pictures.
            shape: height and width of the base's latents.
            scale: of what the net adds.

        Raises:
            InputError: the net is for another denoiser, or the images can't be used.
        """
        _check(net, model)
        _check_size(net, model)
        factor = getattr(model.pipeline, "vae_scale_factor", 8)
        processor = library("diffusers.image_processor").VaeImageProcessor(
            vae_scale_factor=factor, do_convert_rgb=True, do_normalize=False
        )
        try:
            pixels: Tensor = processor.preprocess(image, height=shape[0] * factor, width=shape[1] * factor)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"the ControlNet's image can't be used ({first_line(error)})") from error
        if len(pixels) not in (1, n):
            raise InputError(f"there are {len(pixels)} images for {n} prompts")
        return cls(net, pixels.expand(n, -1, -1, -1).to(model.device, model.main.dtype), scale)


def check_image(net: Any, image: Any) -> None:
    """Raises InputError where there is a ControlNet without an image, or an image without one."""
    if net is None and image is not None:
        raise InputError("there is no ControlNet to show the image to", remedy="Give one with controlnet=.")
    if net is not None and image is None:
        raise InputError("the ControlNet has no image to go by", remedy="Give it as image=.")


def load_controlnet(folder: Path, model: Loaded) -> Any:
    """A ControlNet of diffusers, on a base's device and in its dtype.

    Args:
        folder: with config.json and weights.
        model: the base.

    Raises:
        InputError: there is none, or it is for another denoiser.
    """
    if not (folder / "config.json").is_file():
        raise InputError("is no ControlNet's folder (no config.json in it)", file=folder)
    kind = read_config(folder / "config.json").get("_class_name")
    if kind != "ControlNetModel":
        raise InputError(f"is no ControlNet that is known here, but {kind}", file=folder)
    with quiet_libraries():
        try:
            net = library("diffusers").ControlNetModel.from_pretrained(
                folder, local_files_only=True, torch_dtype=model.main.dtype
            )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise InputError(f"is no ControlNet that diffusers can load ({first_line(error)})", file=folder) from error
    _check(net, model)
    return net.eval().to(model.device)


@contextmanager
def controlled(main: nn.Module, control: Control | None) -> Iterator[None]:
    """A denoiser is steered by a ControlNet as long as the context is open.

    Args:
        main: a U-Net that takes a ControlNet's residuals.
        control: None changes nothing.
    """
    if control is None:
        yield
        return
    forward = main.forward
    signature = inspect.signature(forward)

    @wraps(forward)
    def steered(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        sample = call["sample"]
        # Guidance runs the pictures twice in one batch.
        image = control.image.repeat(len(sample) // len(control.image), 1, 1, 1)
        told = {name: call[name] for name in ("added_cond_kwargs", "class_labels") if call.get(name) is not None}
        down, mid = control.net(
            sample,
            call["timestep"],
            encoder_hidden_states=call["encoder_hidden_states"],
            controlnet_cond=image.to(sample),
            conditioning_scale=control.scale,
            return_dict=False,
            **told,
        )
        call |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return forward(**call)

    with standing_in(main, "forward", steered):
        yield


@contextmanager
def standing_in(of: Any, name: str, function: Any) -> Iterator[None]:
    """A function in the place of an object's method as long as the context is open.

    Args:
        of: the object.
        name: of the method.
        function: called in its place.
    """
    # Offloading hooks put theirs there, too.
    before = vars(of).get(name)
    setattr(of, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(of, name)
        else:
            setattr(of, name, before)


def _check(net: Any, model: Loaded) -> None:
    """Raises InputError where a net and a base don't belong together."""
    accepted = inspect.signature(model.main.forward).parameters
    if "down_block_additional_residuals" not in accepted:
        raise InputError(f"a {type(model.main).__name__} takes no ControlNet", file=model.path)
    theirs, ours = getattr(net, "config", None), model.main.config
    if theirs is None or not hasattr(net, "controlnet_cond_embedding"):
        raise InputError(f"a {type(net).__name__} is no ControlNet of diffusers", file=model.path)
    for name in ("in_channels", "block_out_channels", "cross_attention_dim", "layers_per_block", "down_block_types"):
        here, there = getattr(ours, name, None), getattr(theirs, name, None)
        if _plain(here) != _plain(there):
            what = f"the ControlNet is for another denoiser: its {name} is {there}, the old base's {here}"
            raise InputError(what, file=model.path, remedy="Take one that was trained on the old base.")


def _check_size(net: Any, model: Loaded) -> None:
    """Raises InputError where a net brings images to another size than the base's latents have."""
    shrunk = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
    factor = getattr(model.pipeline, "vae_scale_factor", 8)
    if shrunk != factor:
        what = f"the ControlNet shrinks its image {shrunk} times, and the old base's autoencoder {factor} times"
        raise InputError(what, file=model.path, remedy="Take one that was trained on the old base.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
