"""SVDiff (svdiff-pytorch): shifts of the singular values, one vector per module.

Facts (mkshing/svdiff-pytorch a78f69e; phymhan/SVDiff 4ca843c):

- A folder with ``spectral_shifts.safetensors`` (U-Net) and ``spectral_shifts_te.safetensors`` (text encoder, where it
  was trained too); no metadata. Keys: module path of diffusers or transformers + ``.delta``.
- A linear layer's δ is (min(out, in),), a convolution's (min(out, in · kh · kw),), an embedding's (min(vocabulary,
  width),). W' = U diag(relu(σ + δ)) Vᵀ by the base's own SVD, which isn't stored.
- A norm's weight counts as a matrix of one row: its δ is one number. The paper, and the first author's code, have one
  per element there, W' = W + δ, with keys ``….parametrizations.weight.0.eigenvalues_delta``; that code is not whole,
  and such keys are listed, not read. Biases are never trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

from regraft.adapter import Adapter, ModuleRef
from regraft.errors import InputError, OutputError
from regraft.families import families, find_shape, without_text_model
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._common import check_float, component_for, contiguous, training_metadata
from regraft.formats._factors import cannot_hold
from regraft.tensor_files import read_safetensors
from regraft.tensors import TensorRef
from regraft.updates import SpectralShift, Update
from regraft.updates._kind import scaled_ref

WEIGHTS, TEXT_WEIGHTS = "spectral_shifts.safetensors", "spectral_shifts_te.safetensors"
_SUFFIX = ".delta"
# Share of a file's modules that must be in a family's table.
_ENOUGH = 0.9
_UNET, _TEXT = "unet", "text_encoder"
# Last names of norms in diffusers and transformers: norm1, group_norm, layer_norm2, ln_f, …
_NORM = re.compile(r"(?:^|\.)(?:\w*norm\w*|ln_\w+)$")
# transformers 5 leaves out the level text_model.
_TEXT_STARTS = ("text_model.", "encoder.layers.", "embeddings.", "final_layer_norm")


def _detect(file: AdapterFile) -> bool:
    return file.config is None and any(key.endswith(_SUFFIX) and len(r.shape) == 1 for key, r in file.tensors.items())


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    tensors = dict(file.tensors)
    beside = file.path / TEXT_WEIGHTS
    if file.path.is_dir() and beside.is_file():
        tensors |= read_safetensors(beside).tensors
    updates: dict[ModuleRef, Update] = {}
    unrecognised: list[str] = []
    for key, ref in tensors.items():
        path = key.removesuffix(_SUFFIX)
        if path == key or not path:
            unrecognised.append(key)
            continue
        check_float(ref, file.path, key)
        if len(ref.shape) != 1 or 0 in ref.shape:
            what = f"a shift of singular values must be a vector, but has shape {list(ref.shape)}"
            raise InputError(what, file=file.path, key=key, remedy="The file is damaged: get another one.")
        component = _TEXT if path.startswith(_TEXT_STARTS) else _UNET
        updates[ModuleRef(component, path)] = SpectralShift(ref)
    layout = {"folder": file.path.is_dir()}
    family = _family(updates)
    return Adapter(
        updates, "svdiff", layout, file.metadata, family=family, unrecognised=tuple(unrecognised), path=file.path
    )


def _family(updates: Mapping[ModuleRef, Update]) -> str | None:
    """The family whose modules have as many singular values as there are shifts; norms, with one, tell nothing."""
    told = {module: update.shape[0] for module, update in updates.items() if update.shape != (1,)}
    for family in families().values() if told else ():
        known = 0
        for module, count in told.items():
            shape = find_shape(family.name, module.component, module.path)
            if shape is not None and min(shape[0], prod(shape[1:])) != count:
                break
            known += shape is not None
        else:
            if known >= _ENOUGH * len(told):
                return family.name
    return None


def number_per_element(key: object) -> OutputError:
    """The error for a norm with more than svdiff-pytorch's one number, which it can't load."""
    what = "svdiff-pytorch has one number on a norm, and this adapter one per element"
    return OutputError(what, key=str(key), remedy='Train with norm_shift="scalar", or save it as PEFT does.')


def _per_element(adapter: Adapter, module: ModuleRef, update: SpectralShift) -> bool:
    """Whether it shifts the elements of a norm; by the module's name where no table has its shape."""
    if update.shift.shape[0] == 1:
        return False
    shape = update.weight_shape
    if shape is None and adapter.family is not None:
        shape = find_shape(adapter.family, module.component, module.path)
    return len(shape) == 1 if shape is not None else bool(_NORM.search(module.path))


def _write(adapter: Adapter) -> Written:
    if adapter.tokens:
        raise cannot_hold("SVDiff", "embeddings of added tokens", next(iter(adapter.tokens)))
    own = adapter.format == "svdiff"
    parts: dict[str, dict[str, TensorRef]] = {}
    for module, update in adapter.updates.items():
        if not isinstance(update, SpectralShift):
            raise cannot_hold("SVDiff", f"{update.kind} updates", module)
        component = component_for(adapter, module.component, "SVDiff")
        if component not in (_UNET, _TEXT):
            raise cannot_hold("SVDiff", f"the component {component}", module, "They have unet and text_encoder.")
        if not own and _per_element(adapter, module, update):
            raise number_per_element(module)
        path = module.path
        if component == _TEXT and not own:
            path = f"text_model.{without_text_model(path)}"
        parts.setdefault(component, {})[f"{path}{_SUFFIX}"] = (
            # relu(σ + s · δ): the strength can stand in δ.
            update.shift if update.scale == 1.0 else scaled_ref(update.shift, update.scale)
        )
    metadata = dict(adapter.metadata) if own else training_metadata(adapter.metadata)
    if len(parts) == 1 and own and not adapter.layout["folder"]:
        return Written(contiguous(next(iter(parts.values()))), metadata)
    if _UNET not in parts:
        raise OutputError("an SVDiff folder has a U-Net's shifts, and these have none", file=adapter.path)
    beside = {TEXT_WEIGHTS: contiguous(parts[_TEXT])} if _TEXT in parts else {}
    return Written(contiguous(parts[_UNET]), metadata, beside=beside, folder=True, weights_name=WEIGHTS)


FORMAT = Format("svdiff", "SVDiff (spectral_shifts)", 40, _detect, _read, _write)
