"""What several formats share: checked pairs, remembered spellings, many tensors read at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.errors import InputError, OutputError
from regraft.families import get_family
from regraft.formats._factors import Reshaped
from regraft.formats._hashes import KEYS as HASHES
from regraft.hub import fetch_ahead
from regraft.tensors import InMemory, Shape, Stored, TensorRef, Transposed, check_finite
from regraft.updates import GLora, LoHa, LoKr, LowRank, Tucker, Update

K = TypeVar("K", bound=Hashable)
#: Kinds whose scale is alpha / rank.
Scaled = LowRank | Tucker | LoHa | LoKr | GLora


_SAVE_AGAIN = "The file is damaged: get another one."


def stored(ref: TensorRef) -> Stored | None:
    """The reference into a file that ``ref`` is a view of, or None for a tensor in memory."""
    while isinstance(ref, Transposed | Reshaped):
        ref = ref.of
    return ref if isinstance(ref, Stored) else None


def load_many(refs: Mapping[K, TensorRef]) -> dict[K, Tensor]:
    """Every tensor, read at its offset, so that a file that changed in between is noticed and none is mapped."""
    fetch_ahead(refs.values())
    return {key: ref.load() for key, ref in refs.items()}


def scalars(refs: Mapping[K, TensorRef], file: Path) -> dict[K, float]:
    """The values of one-element tensors.

    Raises:
        InputError: a tensor has more than one element, or is no finite number.
    """
    for key, ref in refs.items():
        if math.prod(ref.shape) != 1:
            raise InputError(
                f"alpha must be one number, but has shape {list(ref.shape)}",
                file=file,
                key=key_of(ref, str(key)),
                remedy=_SAVE_AGAIN,
            )
        if ref.dtype.is_complex:
            raise InputError("alpha is a complex number", file=file, key=key_of(ref, str(key)), remedy=_SAVE_AGAIN)
    values = {key: float(tensor.reshape(()).item()) for key, tensor in load_many(refs).items()}
    for key, value in values.items():
        if not math.isfinite(value):
            raise InputError("alpha is NaN or Inf", file=file, key=key_of(refs[key], str(key)), remedy=_SAVE_AGAIN)
    return values


def alphas_of(updates: Mapping[K, Scaled]) -> dict[K, TensorRef]:
    """The alpha tensor of every update that has one, true for its scale and rank: alpha = scale · rank.

    The file's own tensor where that holds (and where it is 0, which trainers read as the rank); otherwise a new one.
    """
    refs = {key: update.alpha for key, update in updates.items() if update.alpha is not None}
    values = {key: float(tensor.reshape(()).item()) for key, tensor in load_many(refs).items()}
    true = {}
    for key, ref in refs.items():
        wanted = updates[key].scale * (updates[key].rank or 1)
        holds = math.isclose(values[key], wanted, rel_tol=1e-6) or (values[key] == 0 and updates[key].scale == 1.0)
        true[key] = ref if holds else new_alpha(updates[key], ref.dtype)
    return true


def new_alpha(update: Scaled, dtype: torch.dtype = torch.float32) -> TensorRef:
    """A scalar tensor alpha = scale · rank, in ``dtype`` where that holds the value, else in float32."""
    alpha = torch.tensor(update.scale * (update.rank or 1), dtype=torch.float64)
    cast = alpha.to(dtype)
    return InMemory(cast if torch.isclose(cast.double(), alpha, rtol=1e-6) else alpha.float())


def key_of(ref: TensorRef, otherwise: str) -> str:
    """The file's own key of a tensor."""
    # Views of several kinds lie over a file's tensor.
    while hasattr(ref, "of"):
        ref = ref.of
    return ref.name if isinstance(ref, Stored) else otherwise


def doubled(what: str, file: Path, key: str) -> InputError:
    """The error for a key that says once more what another key of the file has said."""
    remedy = "Two spellings of one module in a file contradict each other: keep one."
    return InputError(f"is a second {what}", file=file, key=key, remedy=remedy)


@dataclass
class Parts:
    """The tensors of one module, by role, with the file's keys for messages."""

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    embedding: bool = False

    def add(self, role: str, key: str, ref: TensorRef, file: Path) -> None:
        """Note one tensor.

        Raises:
            InputError: the module has one of that role already.
        """
        if role in self.tensors:
            raise doubled(f"{role} of one module, beside {self.keys[role]}", file, key)
        self.tensors[role], self.keys[role] = ref, key

    def check_pair(self, file: Path) -> tuple[TensorRef, TensorRef]:
        """The pair ``up``, ``down``, checked.

        Raises:
            InputError: a half is missing, a dtype is no float, or the shapes can't belong together.
        """
        for role, other in (("up", "down"), ("down", "up")):
            if role not in self.tensors:
                have = self.keys.get(other) or next(iter(self.keys.values()))
                raise InputError(
                    f"has no matching {role} tensor: half of the pair is missing",
                    file=file,
                    key=have,
                    remedy="The file is incomplete: get it again, or save it again from its trainer.",
                )
        for role in ("up", "down", "magnitude", "bias"):
            if role in self.tensors:
                check_float(self.tensors[role], file, self.keys[role])
        up, down = self.tensors["up"], self.tensors["down"]
        self._check_shapes(up.shape, down.shape, file)
        return up, down

    def _check_shapes(self, up: Shape, down: Shape, file: Path) -> None:
        broken = "The file is damaged or was edited: get another one."
        for role, shape in (("up", up), ("down", down)):
            if len(shape) < 2:
                what = f"a factor must be a matrix or a kernel, but has shape {list(shape)}"
                raise InputError(what, file=file, key=self.keys[role], remedy=broken)
            if 0 in shape:
                what = f"is empty: shape {list(shape)}"
                remedy = "Trained under a sharding optimiser? Gather the weights, then save again."
                raise InputError(what, file=file, key=self.keys[role], remedy=remedy)
        if up[1] != down[0]:
            what = f"rank mismatch: up {list(up)} has {up[1]} columns, down {list(down)} has {down[0]} rows"
            raise InputError(what, file=file, key=self.keys["up"], remedy=broken)
        if self.embedding and (len(up), len(down)) != (2, 2):
            what = f"an embedding's factors must be matrices, but have shapes {list(up)} and {list(down)}"
            raise InputError(what, file=file, key=self.keys["down"], remedy=broken)
        if math.prod(up[2:]) != 1:
            what = f"up must be a 1 × 1 kernel, but has shape {list(up)}"
            raise InputError(what, file=file, key=self.keys["up"], remedy=broken)


def check_float(ref: TensorRef, file: Path, key: str) -> None:
    """Raise an `InputError` where the tensor's dtype is no float."""
    if not ref.dtype.is_floating_point:
        raise InputError(
            f"has dtype {str(ref.dtype).removeprefix('torch.')}, not a float",
            file=file,
            key=key,
            remedy="Quantised factors are not supported: save them as float32, float16 or bfloat16.",
        )


@dataclass
class Choices:
    """Which of several spellings each module of a file has: the usual one per component, and the exceptions.

    A module that the file did not have (renamed by a port) takes the usual one.
    """

    chosen: dict[tuple[str, str], str] = field(default_factory=dict)

    def note(self, component: str, path: str, choice: str) -> None:
        self.chosen[component, path] = choice

    def to_layout(self) -> dict[str, dict[str, str]]:
        """Component → path → spelling; the path ``*`` stands for the rest."""
        layout: dict[str, dict[str, str]] = {}
        for component in dict.fromkeys(component for component, _ in self.chosen):
            here = {path: choice for (c, path), choice in self.chosen.items() if c == component}
            usual = Counter(here.values()).most_common(1)[0][0]
            layout[component] = {"*": usual} | {path: choice for path, choice in here.items() if choice != usual}
        return layout


def chosen(layout: Mapping[str, Mapping[str, str]], component: str, path: str, default: str) -> str:
    """The spelling of a module by what `Choices.to_layout` noted, or ``default`` for an unknown component."""
    here = layout.get(component, {})
    if path in here or not here:
        return here.get(path, default)
    return here["*"]


def check_values(adapter: Adapter) -> None:
    """Load every tensor of an adapter once and make sure that it holds numbers.

    Raises:
        InputError: a tensor holds NaN or Inf, or can't be read.
    """
    named = [(str(module), ref) for module, update in adapter.updates.items() for ref in parts_of(update)]
    named += [(str(token), ref) for token, ref in adapter.tokens.items()]
    for number, tensor in load_many({number: ref for number, (_, ref) in enumerate(named)}).items():
        name, ref = named[number]
        check_finite(tensor, adapter.path, key_of(ref, name))


def parts_of(update: Update) -> Iterable[TensorRef]:
    """Every tensor of an update."""
    return update.parts().values()


def shapes_of(adapter_updates: Mapping[ModuleRef, Update]) -> dict[str, dict[str, Shape]]:
    """Component → path → shape of ΔW, of the updates that know it: what `family_of_modules` takes."""
    shapes: dict[str, dict[str, Shape]] = {}
    for (component, path), update in adapter_updates.items():
        if not update.by_parameter and len(update.shape) > 1:
            shapes.setdefault(component, {})[path] = update.shape
    return shapes


def component_for(adapter: Adapter, component: str, format: str) -> str:
    """The pipeline component that a PEFT adapter's single model is; another component is its own answer.

    Raises:
        OutputError: the model's names don't tell which one it is.
    """
    if component != MODEL:
        return component
    family = get_family(adapter.family)
    if family is None or family.main == MODEL:
        raise OutputError(
            f"{format} files name a pipeline's component (unet, transformer, text_encoder), which these modules' "
            "names don't tell",
            file=adapter.path,
            remedy="Keep PEFT's format.",
        )
    return family.main


def contiguous(tensors: Mapping[str, TensorRef]) -> dict[str, Tensor]:
    """Tensors as `Written` wants them: loaded, contiguous, no two of them sharing memory."""
    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for key, tensor in load_many(tensors).items():
        value = tensor.detach().cpu().contiguous()
        if value.numel() and value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        ready[key] = value
    return ready


#: Metadata that describes one file format's layout, and so must not travel into another format.
OWN_METADATA = ("lora_adapter_metadata", "unet", "text_encoder", "format")


def training_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The metadata that tells of the training (``ss_*``, ``modelspec.*``, …) and is true in any format."""
    return {
        key: value
        for key, value in metadata.items()
        if key not in (*OWN_METADATA, *HASHES) and not key.endswith(":rank") and value != "<embed>"
    }
