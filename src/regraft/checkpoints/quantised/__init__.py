"""Quantised weights, dequantised one at a time: ``x.weight`` in its true shape in place of its packed parts.

One file for each scheme, with ``SCHEMES``; adding a scheme is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from regraft.checkpoints._views import leaves
from regraft.checkpoints.quantised._common import Dequantised, Found, Scheme
from regraft.tensors import TensorRef

__all__ = ["Plain", "Scheme", "plain_weights", "schemes"]

# ``quant_method`` of configs whose weights the schemes here know; a config may also ask to quantise while loading.
_READ = ("bitsandbytes", "gptq", "awq", "fp8", "fbgemm_fp8", "compressed-tensors")


@dataclass(frozen=True)
class Plain:
    """A model's tensors as if it had not been quantised.

    Attributes:
        tensors: by the names of the model's parameters.
        kinds: the schemes and types that were met, for people.
        left_out: stored tensors that no weight is made from: scales of activations, markers of a tool.
    """

    tensors: Mapping[str, TensorRef]
    kinds: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@cache
def schemes() -> tuple[Scheme, ...]:
    """Every scheme."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return tuple(scheme for module in modules for scheme in getattr(module, "SCHEMES", ()))


def plain_weights(tensors: Mapping[str, TensorRef], config: Mapping[str, Any] | None = None) -> Plain:
    """Quantised weights of any known scheme under their modules' ``.weight``; everything else as it is.

    Args:
        tensors: stored name → tensor.
        config: the model's ``config.json``; its ``quantization_config`` settles what the tensors leave open.

    Raises:
        InputError: a quantised weight's parts are missing, do not fit together, or are of an unknown layout.
    """
    settings = (config or {}).get("quantization_config")
    settings = settings if isinstance(settings, Mapping) else {}
    found = _find(tensors, settings)
    owner = {f"{module}{suffix}": module for module, weight in found.items() for suffix in weight.used}
    markers = {marker for scheme in schemes() for marker in scheme.markers}
    if not found and not any(name.rpartition(".")[2] in markers for name in tensors):
        method = settings.get("quant_method")
        unread = isinstance(method, str) and method not in _READ
        return Plain(tensors, (f"{method} (as stored)",) if unread else ())
    shown: dict[str, TensorRef] = {}
    left_out = []
    for name, ref in tensors.items():
        if name in owner:
            weight = found[owner[name]]
            own = weight.weight
            named = replace(own, kind=weight.kind) if isinstance(own, Dequantised) else own
            shown[f"{owner[name]}.weight"] = named
        elif name.rpartition(".")[2] in markers:
            left_out.append(name)
        else:
            shown[name] = ref
    for module, weight in found.items():
        behind = {id(ref) for ref in leaves(weight.weight)}
        left_out += [name for suffix in weight.used if id(tensors[name := f"{module}{suffix}"]) not in behind]
    kinds = dict.fromkeys(weight.kind for weight in found.values() if weight.kind)
    return Plain(shown, tuple(kinds), tuple(left_out))


def is_read(config: Mapping[str, Any]) -> bool:
    """Whether a model's ``config.json`` says that its weights are quantised by a method that is read here."""
    settings = config.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") in _READ


def _find(tensors: Mapping[str, TensorRef], settings: Mapping[str, Any]) -> dict[str, Found]:
    """Module path → its quantised weight."""
    marks = [(mark, scheme) for scheme in schemes() for mark in scheme.marks]
    wanted: dict[str, list[Scheme]] = {}
    for name in tensors:
        for mark, scheme in marks:
            if name.endswith(mark):
                wanted.setdefault(name.removesuffix(mark), []).append(scheme)
    if not wanted:
        return {}
    parts: dict[str, dict[str, TensorRef]] = {module: {} for module in wanted}
    for name, ref in tensors.items():
        # A module's parts stand behind its last dot, or behind `.weight`: nothing is guessed from what lies deeper.
        for end in (name.rfind("."), name.rfind(".weight.")):
            if end > 0 and name[:end] in parts:
                parts[name[:end]][name[end:]] = ref
    found = {}
    for module, candidates in wanted.items():
        for scheme in candidates:
            weight = scheme.read(module, parts[module], settings)
            if weight is not None:
                found[module] = weight
                break
    return found
