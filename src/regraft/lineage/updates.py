"""What an adapter file holds, told in its lineage: modules by kind, and by what convention each is stored."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from regraft.adapter import Adapter, ModuleRef
from regraft.errors import InputError
from regraft.lineage import KEY, dumped, parse_lineage
from regraft.lineage.name_sets import compact

if TYPE_CHECKING:
    from regraft.formats import Written
    from regraft.updates import Update

#: Kinds whose ΔW has a factor beside the stored tensors.
_SCALED = frozenset({"lora", "dora", "tucker", "loha", "lokr", "glora"})


def modules_by_component(refs: Iterable[ModuleRef]) -> dict[str, list[str]]:
    """Component → patterns for exactly these modules."""
    grouped: dict[str, list[str]] = {}
    for component, path in refs:
        grouped.setdefault(component, []).append(path)
    return {component: compact(paths) for component, paths in sorted(grouped.items())}


def update_groups(adapter: Adapter, scale: str) -> list[dict[str, Any]]:
    """The ``updates`` of a lineage.

    Args:
        adapter: whose modules are listed.
        scale: the file's convention, see `scale_convention`.
    """
    grouped: dict[tuple[str, str], list[ModuleRef]] = {}
    for ref, update in adapter.updates.items():
        grouped.setdefault((update.kind, _axis(update)), []).append(ref)
    groups = []
    for (kind, axis), refs in sorted(grouped.items()):
        group: dict[str, Any] = {"kind": kind, "modules": modules_by_component(refs)}
        if kind in _SCALED:
            group["scale"] = scale
        if axis:
            group["axis"] = axis
        groups.append(group)
    return groups


def _axis(update: Update) -> str:
    """Which axis of the weight a DoRA magnitude is per; nothing without one."""
    magnitude = getattr(update, "magnitude", None)
    if magnitude is None:
        return ""
    shape = magnitude.shape
    return "input" if len(shape) > 1 and shape[0] == 1 else "output"


def scale_convention(
    keys: Collection[str], metadata: Mapping[str, str], config: Mapping[str, Any] | None = None
) -> str:
    """How a file stores the factor on ΔW, by its keys, its header and PEFT's config beside it.

    ``alpha/rank``, ``alpha/sqrt(rank)`` (rsLoRA), or ``one``: ΔW is the product of the tensors as they are.
    """
    if config is not None:
        return "alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank"
    if any(key.endswith(".alpha") for key in keys):
        return "alpha/rank"
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return "one"
    try:
        stated = json.loads(text)
    except ValueError:
        return "one"
    rooted = isinstance(stated, dict) and any(
        name.endswith("use_rslora") and value is True for name, value in stated.items()
    )
    return "alpha/sqrt(rank)" if rooted else "alpha/rank"


def restated(adapter: Adapter, written: Written) -> dict[str, str]:
    """The metadata of a file to be written, its lineage's ``updates`` true of this very file."""
    metadata = dict(written.metadata)
    if KEY not in metadata:
        return metadata
    text = written.files.get("adapter_config.json")
    config = json.loads(text) if isinstance(text, str) else None
    try:
        lineage = parse_lineage(metadata[KEY], file=adapter.path)
    except InputError:
        # Another's later version, or damage that is told where the lineage is asked for: it goes along as it is.
        return metadata
    scale = scale_convention(written.tensors.keys(), metadata, config)
    return {**metadata, KEY: dumped({**lineage, "updates": update_groups(adapter, scale)})}
