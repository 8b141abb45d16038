"""Files of svdiff-pytorch: ``spectral_shifts.safetensors``, one vector ``<module>.delta`` per module.

A text encoder's is ``spectral_shifts_te.safetensors``, with transformers 4's names. Further facts about them stand in
`regraft.formats.svdiff`. They tell neither the base nor what a norm's number means: one number is a shift of its norm
(svdiff-pytorch's own), as many as it has elements are a shift of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.functional import set_adapter
from safetensors.torch import save_file
from torch import Tensor, nn

from regraft.errors import InputError, OutputError, reading
from regraft.families import without_text_model
from regraft.formats.svdiff import TEXT_WEIGHTS, WEIGHTS, number_per_element
from regraft.output import readable, whole
from regraft.tensor_files import read_safetensors
from regraft.tuners._layer import is_quantised
from regraft.tuners._model import base_modules, tuned_layers
from regraft.tuners.svdiff.config import SvdiffConfig
from regraft.tuners.svdiff.layer import SvdiffLayer, shift_count

_SUFFIX, _TEXT_MODEL = ".delta", "text_model."


def load_spectral_shifts(model: nn.Module, path: str | Path, adapter_name: str = "default") -> SvdiffConfig:
    """Put svdiff-pytorch's shifts on a model, in place, as the active adapter; others stay on it.

    Args:
        model: the U-Net of diffusers or the text encoder of transformers that they are of, without PEFT's wrapper.
        path: a file, or a folder, whose ``spectral_shifts.safetensors`` is read, or ``spectral_shifts_te.safetensors``
            for a text encoder.
        adapter_name: the adapter's name from then on.

    Returns:
        The configuration that such an adapter has.

    Raises:
        InputError: the file can't be read, is none of these, or doesn't fit the model, which stays as it was; or the
            name is taken.
    """
    path = Path(path) / _file_name(model) if Path(path).is_dir() else Path(path)
    if any(adapter_name in layer.scaling for _, layer in tuned_layers(model, SvdiffLayer)):
        what = f"the model has an SVDiff adapter {adapter_name!r} already"
        raise InputError(what, file=path, remedy="Give it another adapter_name.")
    layers = _layers(model)
    shifts: dict[str, Tensor] = {}
    for key, ref in read_safetensors(path).tensors.items():
        if not key.endswith(_SUFFIX) or len(ref.shape) != 1:
            what = f"is no shift of singular values, of shape {list(ref.shape)}"
            raise InputError(what, file=path, key=key, remedy="Give a spectral_shifts.safetensors.")
        with reading(path, key):
            shifts[_place(layers, key.removesuffix(_SUFFIX), path)] = ref.load().float()
    on_vectors = [shift for name, shift in shifts.items() if len(_shape(layers[name], name)) == 1]
    single = all(len(shift) == 1 for shift in on_vectors)
    config = SvdiffConfig(target_modules=list(shifts), norm_shift="scalar" if single else "element")
    for name, shift in shifts.items():
        _check_fits(layers[name], name, shift, config, path)
    tuned: Any = inject_adapter_in_model(config, model, adapter_name)
    if hasattr(tuned, "_hf_peft_config_loaded"):
        # What `set_adapters` and the like of diffusers and transformers look at first.
        tuned._hf_peft_config_loaded = True
    set_adapter(tuned, adapter_name)
    with torch.no_grad():
        for name, layer in tuned_layers(model, SvdiffLayer):
            if name in shifts:
                layer.svdiff_delta[adapter_name].copy_(shifts[name])
    return config


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """By path, the modules with a weight."""
    modules = base_modules(model).items()
    return {name: module for name, module in modules if isinstance(getattr(module, "weight", None), nn.Parameter)}


def _place(layers: Mapping[str, nn.Module], name: str, path: Path) -> str:
    # transformers 5 leaves out the level text_model.
    for found in (name, without_text_model(name), f"{_TEXT_MODEL}{name}"):
        if found in layers:
            return found
    raise InputError(
        "the model has no such module with a weight", file=path, key=name, remedy="Is the file of this model?"
    )


def _check_fits(layer: nn.Module, name: str, shift: Tensor, config: SvdiffConfig, path: Path) -> None:
    try:
        SvdiffLayer.check(layer, config, name)
    except TypeError as error:
        raise InputError(str(error), file=path, remedy="Is it of this model?") from None
    count = shift_count(_shape(layer, name), config.norm_shift)
    if len(shift) != count:
        what = f"has {len(shift)} numbers where the module has {count}"
        raise InputError(what, file=path, key=name, remedy="Is it of this model?")


def _shape(layer: Any, name: str) -> Sequence[int]:
    """Of the weight, of which a quantised layer may hold packed numbers, in floating point or not."""
    if is_quantised(layer, name, SvdiffLayer.title):
        return layer.out_features, layer.in_features
    weight: Tensor = layer.weight
    return weight.shape


def _is_text_encoder(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) == "clip_text_model"


def _file_name(model: nn.Module) -> str:
    return TEXT_WEIGHTS if _is_text_encoder(model) else WEIGHTS


def save_spectral_shifts(model: nn.Module, path: str | Path, adapter_name: str = "default") -> Path:
    """Write an SVDiff adapter as svdiff-pytorch does, strengths folded in.

    Args:
        model: with the adapter.
        path: a ``.safetensors`` file, or a folder for a ``spectral_shifts.safetensors`` in it, of a text encoder
            ``spectral_shifts_te.safetensors``.
        adapter_name: which.

    Returns:
        The file that was written.

    Raises:
        OutputError: there is no such adapter, it has what svdiff-pytorch's files have no place for (biases, whole
            modules, a number per element of a norm), or the file can't be written.
    """
    _check_shifts_alone(model, adapter_name)
    shifts: dict[str, Tensor] = {}
    text = _is_text_encoder(model)
    for _, layer in tuned_layers(model, SvdiffLayer):
        if adapter_name not in layer.scaling:
            continue
        delta = layer.svdiff_delta[adapter_name].detach()
        if layer.on_vector and len(delta) > 1:
            raise number_per_element(layer.key)
        name = f"{_TEXT_MODEL}{without_text_model(layer.key)}" if text else layer.key
        shifts[f"{name}{_SUFFIX}"] = (layer.scaling[adapter_name] * delta).cpu().contiguous()
    if not shifts:
        raise OutputError(f"there is no SVDiff adapter {adapter_name!r} to save")
    path = Path(path)
    if path.suffix != ".safetensors":
        path.mkdir(parents=True, exist_ok=True)
        path = path / _file_name(model)
    with whole(path) as stage:
        save_file(shifts, stage)
        readable(stage)
    return path


def _check_shifts_alone(model: nn.Module, adapter_name: str) -> None:
    configs: Any = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, SvdiffConfig):
        return
    other = [f"whole modules ({', '.join(sorted(config.modules_to_save))})"] if config.modules_to_save else []
    other += ["biases"] if config.bias != "none" else []
    if other:
        what = f"svdiff-pytorch's files hold shifts alone, and this adapter has {' and '.join(other)} too"
        raise OutputError(what, key=adapter_name, remedy="Save it as PEFT does, with save_pretrained.")
