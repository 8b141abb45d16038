"""Adapters for models that are in memory: ported on the way in, where they were made for other weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from regraft.adapter import MODEL, Adapter
from regraft.base import Base, open_base
from regraft.carry import Settings
from regraft.errors import InputError, shortened
from regraft.formats import load_adapter
from regraft.hub import hub_id_of
from regraft.identify import clues_of
from regraft.lineage import lineage_of
from regraft.lineage.model import BaseId
from regraft.methods.task import Running
from regraft.migration import Migration
from regraft.migration_file import load_migration
from regraft.migrations.base_id import base_id, called
from regraft.migrations.recognise import recognise
from regraft.pairing import names_of
from regraft.port import apply_migration, port
from regraft.tensors import InMemory, TensorRef
from regraft.updates import LowRank

_log = logging.getLogger("regraft")
# Of a pipeline, what adapters change, by diffusers' names.
_COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")

# Names come from strangers' files.
_LONGEST_NAME = 200


@dataclass(frozen=True)
class _Held(InMemory):
    """A parameter of a model, wherever it lies."""

    def load(self) -> Tensor:
        return self.tensor.detach().cpu()


def base_in(model: Any) -> Base:
    """A model or pipeline in memory, as a base: its weights are not copied.

    Args:
        model: of transformers or diffusers, a pipeline, or PEFT's model around one; adapters in it are left out.

    Raises:
        InputError: it is none of these, or quantised: its weights are not there to compare.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    parts = {name: getattr(model, name, None) for name in _COMPONENTS}
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if isinstance(model, nn.Module):
        modules = {MODEL: model}
    if not modules:
        raise InputError(f"a {type(model).__name__} is no model and no pipeline")
    configs = {name: _config(part) for name, part in modules.items()}
    place = _place(model)
    return Base(place, {name: _tensors(part, place) for name, part in modules.items()}, configs, "in memory")


def ported(
    adapter: Adapter | str | Path,
    to: Any,
    old: Base | str | Path | None = None,
    *,
    migration: Migration | str | Path | None = None,
    method: str = "auto",
    force: bool = False,
) -> dict[str, Tensor]:
    """A LoRA's tensors for a pipeline in memory, as ``pipe.load_lora_weights`` takes them.

    ``pipe.load_lora_weights(regraft.ported("my_lora.safetensors", to=pipe, old="sd15"))``

    Where its lineage says that it was made for these very weights, it is returned as it is. No model is run: what
    `auto` can't tell from weights it leaves a copy. What was done is logged by the logger ``regraft``.

    Args:
        adapter: a file, a folder, or read.
        to: the pipeline.
        old: the base that it was trained on: a file, a folder or a hub id, or open. Not needed where the adapter's
            lineage names the weights in memory.
        migration: a saved one, in place of the old base.
        method: see `regraft.port`.
        force: port against a refusal.

    Returns:
        ``<component>.<module>.lora_A.weight`` and ``lora_B.weight``, with the scale in the latter; for DoRA the
        magnitude beside them.

    Raises:
        InputError: its lineage doesn't name these weights, and neither ``old`` nor ``migration`` is given; or it is
            no LoRA.
        Refused: it would not survive.
    """
    carried = _carried(adapter, base_in(to), old, migration, method, force)
    tensors: dict[str, Tensor] = {}
    for (component, path), update in carried.updates.items():
        if not isinstance(update, LowRank) or update.bias is not None or update.orientation != "weight":
            raise InputError(
                "is no plain LoRA, which is all that tensors alone can say",
                file=carried.path,
                key=path,
                remedy="Port it into a file: regraft port … -o ported.safetensors.",
            )
        stem = path if component == MODEL else f"{component}.{path}"
        tensors[f"{stem}.lora_A.weight"] = update.down.load()
        tensors[f"{stem}.lora_B.weight"] = update.up.load() * update.scale
        if update.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = update.magnitude.load().flatten()
    return tensors


def load_ported(
    model: Any,
    adapter: Adapter | str | Path,
    adapter_name: str = "default",
    old: Base | str | Path | None = None,
    *,
    migration: Migration | str | Path | None = None,
    method: str = "auto",
    force: bool = False,
) -> Any:
    """``load_adapter`` of PEFT or transformers, ported first where it was made for other weights.

    Args:
        model: PEFT's, or transformers' own.
        adapter: PEFT's folder, any other file, or read.
        adapter_name: that it gets in the model.
        old: the base that it was trained on: a file, a folder or a hub id, or open. Not needed where the adapter's
            lineage names the weights in memory.
        migration: a saved one, in place of the old base.
        method: see `regraft.port`.
        force: port against a refusal.

    Returns:
        What the model's ``load_adapter`` does.

    Raises:
        InputError: its lineage doesn't name these weights, and neither ``old`` nor ``migration`` is given; or the
            model loads no adapters.
        Refused: it would not survive.
    """
    if not hasattr(model, "load_adapter"):
        raise InputError(f"a {type(model).__name__} loads no adapters")
    carried = _carried(adapter, base_in(model), old, migration, method, force)
    with TemporaryDirectory() as place:
        folder = Path(place) / "ported"
        carried.save(folder, format="peft")
        return model.load_adapter(str(folder), adapter_name=adapter_name)


def _carried(
    adapter: Adapter | str | Path,
    new: Base,
    old: Base | str | Path | None,
    migration: Migration | str | Path | None,
    method: str,
    force: bool,
) -> Adapter:
    """The adapter for the new base, or the very same where it is for it already."""
    read = adapter if isinstance(adapter, Adapter) else load_adapter(Path(adapter), names=names_of(new))
    lineage = lineage_of(read)
    wanted = None if lineage is None else BaseId.model_validate(lineage["base"])
    if wanted is not None and _is(new, wanted, read):
        _log.info("%s was made for these weights", read.path or "the adapter")
        return read
    if old is None and migration is None:
        raise _lacking(read, wanted, new)
    settings = Settings(running=Running(weights_only=True), force=force)
    if migration is not None:
        known = migration if isinstance(migration, Migration) else load_migration(Path(migration))
        result = apply_migration(read, known, settings, old=None, new=new)
    else:
        first = old if isinstance(old, Base) else open_base(Path(str(old)))
        result = port(read, first, new, method, settings=settings)
    _log.warning("%s was ported: %s", read.path or "the adapter", result.report.summary)
    return result.adapter


def _lacking(adapter: Adapter, wanted: BaseId | None, new: Base) -> InputError:
    """What to give for an adapter of other weights: the old base, by the name that the file has for it."""
    remedies = ["or migration=, a file of `regraft migration make` from there to this model"]
    if wanted is None:
        what = "does not say which weights it was made for: it has no lineage"
        name = next((clue.value for clue in clues_of(adapter) if clue.kind == "name"), None)
        stamp = f"regraft lineage stamp {adapter.path or 'FILE'} --base {new.path} --in-place"
        remedies.append(f"or, if it was trained on this very model, stamp it once: {stamp}")
    else:
        what, name = f"was made for other weights: those of {shortened(called(wanted), _LONGEST_NAME)}", wanted.name
    whole = "the base that it was trained on: a file, a folder or a hub id"
    if name is None:
        given = f"old=, {whole}"
    elif hub_id_of(name) is not None or os.path.exists(name):
        given = f"old={shortened(name, _LONGEST_NAME)!r}, {whole}"
    else:
        given = f"old=, the path or hub id of {shortened(name, _LONGEST_NAME)!r}, which it names as its base"
    return InputError(what, file=adapter.path, remedy=f"Give {'; '.join([given, *remedies])}.")


def _is(base: Base, wanted: BaseId, adapter: Adapter) -> bool:
    given = BaseId.model_validate(base_id(base))
    components = {module.component for module in adapter.updates}
    if given.fingerprint == wanted.fingerprint:
        return True
    return recognise(given, {wanted.fingerprint: wanted}, components).base is not given


def _tensors(model: nn.Module, place: Path) -> dict[str, TensorRef]:
    """A model's own parameters and buffers by the names that its files have."""
    found: dict[str, TensorRef] = {}
    state = model.state_dict()
    # bitsandbytes packs into any dtype, a floating one too; how is said beside the weight.
    packed = {name.partition(".quant_state.")[0] for name in state if ".quant_state." in name}
    for name, value in state.items():
        # PEFT keeps a changed layer as it was below `base_layer`, and its own parts beside it.
        plain = name.replace(".base_layer.", ".")
        if ".lora_" in name or not isinstance(value, Tensor):
            continue
        if plain.endswith(".weight") and (name in packed or not value.is_floating_point()):
            raise InputError("is quantised in memory: its weights can't be compared", file=place, key=plain)
        found[plain] = _Held(value)
    return found


def _config(part: Any) -> Mapping[str, Any]:
    config = getattr(part, "config", None)
    plain = getattr(config, "to_dict", None)
    found: Mapping[str, Any] = plain() if plain is not None else dict(config or {})
    return found


def _place(model: Any) -> Path:
    """Where it was loaded from, by its own account."""
    config = getattr(model, "config", None)
    names = (getattr(config, "_name_or_path", None), getattr(model, "name_or_path", None))
    return Path(next((name for name in names if isinstance(name, str) and name), type(model).__name__))
