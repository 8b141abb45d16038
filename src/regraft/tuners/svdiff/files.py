"""Files of svdiff-pytorch: ``spectral_shifts.safetensors``, one vector ``<module>.delta`` per module.

Facts about them stand in `regraft.formats.svdiff`. They tell neither the base nor what a norm's number means: one
number is a shift of its norm (svdiff-pytorch's own), as many as it has elements are a shift of each.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from regraft.errors import InputError, OutputError, reading
from regraft.formats.svdiff import WEIGHTS
from regraft.tensor_files import read_safetensors
from regraft.tuners._model import tuned_layers
from regraft.tuners.svdiff.config import SvdiffConfig
from regraft.tuners.svdiff.layer import SvdiffLayer

_SUFFIX, _TEXT_MODEL = ".delta", "text_model."


def load_spectral_shifts(model: nn.Module, path: str | Path, adapter_name: str = "default") -> SvdiffConfig:
    """Put svdiff-pytorch's shifts on a model, in place.

    Args:
        model: the U-Net of diffusers or the text encoder of transformers that they are of, without PEFT's wrapper.
        path: a file, or a folder, whose ``spectral_shifts.safetensors`` is read.
        adapter_name: the adapter's name from then on.

    Returns:
        The configuration that such an adapter has.

    Raises:
        InputError: the file can't be read, is none of these, or doesn't fit the model.
    """
    path = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    shifts: dict[str, Tensor] = {}
    for key, ref in read_safetensors(path).tensors.items():
        if not key.endswith(_SUFFIX) or len(ref.shape) != 1:
            what = f"is no shift of singular values, of shape {list(ref.shape)}"
            raise InputError(what, file=path, key=key, remedy="Give a spectral_shifts.safetensors.")
        with reading(path, key):
            shifts[_place(model, key.removesuffix(_SUFFIX), path)] = ref.load().float()
    weights = dict(model.named_parameters())
    on_vectors = [shift for name, shift in shifts.items() if weights[f"{name}.weight"].dim() == 1]
    single = all(len(shift) == 1 for shift in on_vectors)
    config = SvdiffConfig(target_modules=list(shifts), norm_shift="scalar" if single else "element")
    inject_adapter_in_model(config, model, adapter_name)
    for name, layer in tuned_layers(model, SvdiffLayer):
        if name not in shifts:
            continue
        target = layer.svdiff_delta[adapter_name]
        if target.shape != shifts[name].shape:
            what = f"has {len(shifts[name])} numbers where the module has {len(target)}"
            raise InputError(what, file=path, key=name, remedy="Is it of this model?")
        with torch.no_grad():
            target.copy_(shifts[name])
    return config


def _place(model: nn.Module, name: str, path: Path) -> str:
    # transformers 5 leaves out the level text_model.
    for found in (name, name.removeprefix(_TEXT_MODEL), f"{_TEXT_MODEL}{name}"):
        if any(key == f"{found}.weight" for key, _ in model.named_parameters()):
            return found
    raise InputError(
        "the model has no such module with a weight", file=path, key=name, remedy="Is the file of this model?"
    )


def save_spectral_shifts(model: nn.Module, path: str | Path, adapter_name: str = "default") -> Path:
    """Write an SVDiff adapter as svdiff-pytorch does, strengths folded in.

    Args:
        model: with the adapter.
        path: a ``.safetensors`` file, or a folder for a ``spectral_shifts.safetensors`` in it.
        adapter_name: which.

    Returns:
        The file that was written.

    Raises:
        OutputError: there is no such adapter, or its norms have a number per element, which svdiff-pytorch's don't.
    """
    shifts: dict[str, Tensor] = {}
    for _, layer in tuned_layers(model, SvdiffLayer):
        if adapter_name not in layer.scaling:
            continue
        delta = layer.svdiff_delta[adapter_name].detach()
        if layer.on_vector and len(delta) > 1:
            what = "svdiff-pytorch has one number on a norm, and this adapter one per element"
            raise OutputError(what, key=layer.key, remedy='Train with norm_shift="scalar", or save it as PEFT does.')
        shifts[f"{layer.key}{_SUFFIX}"] = (layer.scaling[adapter_name] * delta).cpu().contiguous()
    if not shifts:
        raise OutputError(f"there is no SVDiff adapter {adapter_name!r} to save")
    path = Path(path)
    if path.suffix != ".safetensors":
        path.mkdir(parents=True, exist_ok=True)
        path = path / WEIGHTS
    save_file(shifts, path)
    return path
