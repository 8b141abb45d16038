"""The new base with PEFT's layers in it, started from a ported adapter; and the adapter taken out of them again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.changes import by_itself, on_weight
from regraft.errors import InputError
from regraft.ops._common import BaseWeights
from regraft.refine.encoders import trainable_encoders
from regraft.refine.quantised import Quantize, quantise
from regraft.runtime.applied import Place, applied, find_places
from regraft.runtime.both import modules_of, twin
from regraft.runtime.libraries import library
from regraft.runtime.load import Loaded
from regraft.runtime.record import is_conv1d
from regraft.tensors import InMemory
from regraft.transport import cut
from regraft.updates import Diff, LowRank, SpectralShift, Update
from regraft.updates.exact import as_lowrank, refactor

_NAME = "refined"


@dataclass(frozen=True, eq=False)
class Student:
    """A model whose PEFT layers are trained.

    Attributes:
        model: the new base's tensors, with trainable layers of its own.
        layers: module of the new base → PEFT's layer in its place.
        start: the updates that the layers were started from, by the new base's names.
        rest: updates that are not trained: norms, biases, embeddings. They are merged into the model.
        quantised: how the model's own layers are held, where not whole; in words.
        encoders: a pipeline's text encoders that are trained: its prompts are encoded anew at every step.
    """

    model: Loaded
    layers: Mapping[ModuleRef, Any]
    start: Mapping[ModuleRef, LowRank]
    rest: Mapping[ModuleRef, Update]
    quantised: str = ""
    encoders: frozenset[str] = frozenset()

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for part in self.model.components.values() for p in part.parameters() if p.requires_grad]

    def state(self) -> dict[str, Tensor]:
        """A copy of what is trained, by name."""
        return {
            f"{component}.{name}": parameter.detach().cpu().clone()
            for component, part in self.model.components.items()
            for name, parameter in part.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set what `state` gave."""
        for component, part in self.model.components.items():
            for name, parameter in part.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state[f"{component}.{name}"])

    @torch.no_grad()
    def updates(self) -> dict[ModuleRef, Update]:
        """The adapter as it is now, by the new base's names: trained updates and the rest."""
        made: dict[ModuleRef, Update] = dict(self.rest)
        for ref, layer in self.layers.items():
            like = self.start[ref]
            down, up = (getattr(layer, name)[_NAME].weight.detach().float().cpu() for name in ("lora_A", "lora_B"))
            up, down = up.flatten(1), down.flatten(1)
            if is_conv1d(layer.base_layer):
                up, down = down.T, up.T
            update = like.with_factors(up / like.scale, down)
            if like.magnitude is not None:
                trained = layer.lora_magnitude_vector[_NAME].weight.detach().cpu()
                magnitude = trained.reshape(like.magnitude.shape).to(like.magnitude.dtype)
                update = replace(update, magnitude=InMemory(magnitude))
            if like.bias is not None:
                bias = layer.lora_B[_NAME].bias.detach().float().cpu() / like.scale
                update = replace(update, bias=InMemory(bias.to(like.bias.dtype)))
            made[ref] = update
        return made


@contextmanager
def student_of(
    base: Loaded,
    start: Adapter,
    *,
    rank: int | None = None,
    targets: Sequence[str] = (),
    seed: int = 0,
    quantize: Quantize = "none",
    precision: str = "no",
) -> Iterator[Student]:
    """A student on the tensors of a loaded base, which stay as they are.

    Args:
        base: the new base.
        start: an adapter by the new base's own names. What acts on the weight itself, or holds the change of a layer's
            whole weight, is trained as the LoRA that equals its change of this base; whole values, norms and biases are
            merged and kept as they are.
        rank: of every trained update; None for each one's own. Added directions start at zero effect.
        targets: patterns (``*.q_proj``) of further modules to train, from zero.
        seed: of added directions.
        quantize: hold the base's linear layers in so many bits; see `regraft.refine.quantised`.
        precision: that quantised layers compute in.

    Raises:
        InputError: nothing of the adapter can be trained, or a pattern matches no module.
    """
    model = twin(base)
    places, _ = find_places(model.components, start)
    # By the base's shapes, which some kinds' files don't tell.
    updates = {ref: places[ref].update if ref in places else update for ref, update in start.updates.items()}
    updates = dict(_form(ref, update, places.get(ref), updates) for ref, update in updates.items())
    own = {ref: update for ref, update in updates.items() if isinstance(update, LowRank)}
    # Where nobody else holds it, quantising lets go of the whole weights.
    del base
    encoders = trainable_encoders(model, own, targets)
    trained = {
        ref: own[ref]
        for ref, module in modules_of(model, own).items()
        if not why_not(model, ref, module, encoders, own[ref])
    }
    # One file may hold one kind: what is not trained has become a LoRA beside the trained ones, too.
    rest = {ref: update for ref, update in updates.items() if ref not in trained}
    generator = torch.Generator().manual_seed(seed)
    trained |= _further(model, targets, trained, rank, encoders)
    trained = {ref: _of_rank(update, rank or update.rank, generator) for ref, update in trained.items()}
    if not trained:
        raise nothing_to_train(start.path)
    with ExitStack() as stack:
        stack.enter_context(applied(model.components, replace(start, updates=rest)))
        for part in model.components.values():
            part.requires_grad_(False)
        quantised = quantise(model, quantize, precision)
        encoders &= {ref.component for ref in trained}
        yield Student(model, _injected(model, trained), trained, rest, quantised, encoders)


def _form(
    ref: ModuleRef, update: Update, place: Place | None, others: Collection[ModuleRef]
) -> tuple[ModuleRef, Update]:
    """The LoRA that an update equals on this base, and its module; where it has none, itself.

    A norm's shift of singular values is the change of its weight, which files that hold LoRAs have a place for.

    Args:
        ref: as the adapter names it.
        update: its update, by the base's shape.
        place: where that goes; None where the base has no such place.
        others: that the adapter changes, too.
    """
    if update.by_parameter:
        home = ModuleRef(ref.component, ref.path.removesuffix(".weight"))
        whole = isinstance(update, Diff) and place is not None and place.name == "weight" and home not in others
        if whole and place is not None and _is_layer(place.module):
            return home, refactor(update.delta(place.tensor.detach().cpu())).update
        return ref, update
    low = as_lowrank(update) or by_itself(update)
    if low is not None or place is None:
        return ref, low or update
    weight, bias = place.tensor.detach().cpu(), getattr(place.module, "bias", None)
    parameter = ModuleRef(ref.component, f"{ref.path}.{place.name}")
    if weight.dim() < 2:
        shifts = isinstance(update, SpectralShift) and parameter not in others
        return (parameter, Diff(InMemory(update.delta(weight)), f"{ref.path}.w_norm")) if shifts else (ref, update)
    try:
        return ref, on_weight(update, weight, bias=bias.detach().cpu() if isinstance(bias, Tensor) else None)
    except ValueError:
        # It acts across the rows of a fused weight of which this is a part.
        return ref, update


def _is_layer(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d) or (module is not None and is_conv1d(module))


def could_train(adapter: Adapter, base: Base) -> bool:
    """Whether anything of it may be trained, told from kinds and shapes alone: the updates' and the base's.

    Args:
        adapter: any.
        base: that it is for.
    """
    weights = BaseWeights(base, adapter)
    for ref, update in adapter.updates.items():
        if update.by_parameter:
            shape = update.shape if isinstance(update, Diff) and ref.path.endswith(".weight") else ()
        else:
            found = weights.find(ref)
            # What the base lacks is told of where it is looked for.
            shape = found.shape if found is not None else (0, 0)
        if len(shape) > 1:
            return True
    return False


def nothing_to_train(path: Path | None) -> InputError:
    """The error for an adapter of which nothing can be trained."""
    what = "changes no linear layer or convolution that could be trained (whole values, norms and biases are not)"
    return InputError(what, file=path, remedy="Name modules with --targets.")


def why_not(
    model: Loaded,
    ref: ModuleRef,
    module: nn.Module | None,
    encoders: Collection[str] = (),
    update: LowRank | None = None,
) -> str:
    """Why no LoRA can be trained there; empty where one can.

    Args:
        model: the new base.
        ref: its module.
        module: the same, loaded.
        encoders: as `regraft.refine.encoders.trainable_encoders` gives them.
        update: that is to be trained.
    """
    if update is not None and update.magnitude is not None and update.bias is not None:
        return "PEFT has no DoRA with a bias of its own"
    if model.pipeline is not None and ref.component != model.main_name and ref.component not in encoders:
        return f"its pipeline runs the {ref.component} without gradients"
    return "" if _is_layer(module) else "its module is no linear layer or convolution"


def _further(
    model: Loaded,
    targets: Sequence[str],
    trained: Mapping[ModuleRef, LowRank],
    rank: int | None,
    encoders: Collection[str],
) -> dict[ModuleRef, LowRank]:
    found: dict[ModuleRef, LowRank] = {}
    ranks = sorted(update.rank for update in trained.values())
    r = rank or (ranks[len(ranks) // 2] if ranks else 8)
    for pattern in targets:
        hits = [
            (ModuleRef(component, name), module)
            for component, part in model.components.items()
            for name, module in part.named_modules()
            if fnmatchcase(name, pattern) and isinstance(module, nn.Linear)
            if not why_not(model, ModuleRef(component, name), module, encoders)
        ]
        if not hits:
            raise InputError(f"no module of the new base matches {pattern!r}", file=model.path, remedy="See --targets.")
        for ref, module in hits:
            if ref not in trained:
                up, down = torch.zeros(module.out_features, r), torch.zeros(r, module.in_features)
                found[ref] = LowRank(InMemory(up), InMemory(down), 1.0)
    return found


def _of_rank(update: LowRank, rank: int, generator: torch.Generator) -> LowRank:
    """An update cut or filled up to a rank; a direction without effect gets a random A, so that it can be trained."""
    up, down = update.factors()
    if update.rank > rank:
        up, down = cut(up, down, rank)
    silent = up.abs().amax(0) == 0
    up, down = nn.functional.pad(up, (0, rank - up.shape[1])), nn.functional.pad(down, (0, 0, 0, rank - down.shape[0]))
    silent = nn.functional.pad(silent, (0, rank - len(silent)), value=True)
    noise = torch.randn(down.shape, generator=generator) / down.shape[1] ** 0.5
    return update.with_factors(up, torch.where(silent[:, None], noise, down))


def _injected(model: Loaded, trained: Mapping[ModuleRef, LowRank]) -> dict[ModuleRef, Any]:
    """PEFT's layers, holding the updates' own numbers."""
    modules = modules_of(model, trained)
    layers: dict[ModuleRef, Any] = {}
    for part in model.components.values():
        named = {module: name for name, module in part.named_modules()}
        names = {ref: named[module] for ref, module in modules.items() if module in named}
        # One configuration is either DoRA or not, with biases or not: each sort is injected under the same name, in a
        # round of its own.
        sorts: dict[tuple[bool, bool], dict[str, LowRank]] = {}
        for ref, name in names.items():
            update = trained[ref]
            sorts.setdefault((update.magnitude is not None, update.bias is not None), {})[name] = update
        for (dora, bias), updates in sorts.items():
            _inject(part, updates, dora, bias)
        layers |= {ref: part.get_submodule(name) for ref, name in names.items()}
    for ref, layer in layers.items():
        _set(layer, trained[ref])
    return layers


def _inject(part: nn.Module, updates: Mapping[str, LowRank], dora: bool, bias: bool) -> None:
    """Put layers of the updates' ranks in the place of the modules of these names."""
    peft = library("peft")
    # Whole names, so that a short one is not taken for the end of a long one.
    ranks = {f"^{re.escape(name)}$": update.rank for name, update in updates.items()}
    first = next(iter(ranks.values()))
    config = peft.LoraConfig(
        r=first,
        lora_alpha=first,
        target_modules=list(updates),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        use_dora=dora,
        lora_bias=bias,
        fan_in_fan_out=any(is_conv1d(part.get_submodule(name)) for name in updates),
    )
    with warnings.catch_warnings():
        # Of rounds, which are meant, and of layers that could not be merged, which none is.
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, part, adapter_name=_NAME)


@torch.no_grad()
def _set(layer: Any, update: LowRank) -> None:
    up, down = update.factors()
    up = up * update.scale
    if is_conv1d(layer.base_layer):
        up, down = down.T, up.T
    for name, value in (("lora_A", down), ("lora_B", up)):
        weight = getattr(layer, name)[_NAME].weight
        weight.copy_(value.reshape(weight.shape))
    if update.bias is not None:
        layer.lora_B[_NAME].bias.copy_(update.scale * update.bias.load().float())
    if update.magnitude is not None:
        weight = layer.lora_magnitude_vector[_NAME].weight
        weight.copy_(update.magnitude.load().reshape(weight.shape))
