"""What an adapter file is, told from its header: format, family, components, ranks. No factor is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from regraft._version import __version__
from regraft.adapter import Adapter, ModuleRef
from regraft.formats import BaseNames, load_adapter
from regraft.formats._common import load_many
from regraft.formats._peft_config import implied_alpha
from regraft.formats.diffusers import component_configs
from regraft.report.schema import ComponentSummary, InspectReport
from regraft.updates import LowRank


def inspect_adapter(path: str | Path, *, names: BaseNames | None = None) -> InspectReport:
    """Describe an adapter file or folder.

    Args:
        path: a weights file, or a PEFT folder.
        names: component → module names of the base, for underscored names of unknown families.

    Raises:
        InputError: it can't be read, or a tensor pair is broken.
    """
    return describe(load_adapter(path, names=names, whole=False), path)


def describe(adapter: Adapter, path: str | Path) -> InspectReport:
    """The record of an adapter that was read already."""
    alphas = _alphas(adapter)
    components = {}
    for name, updates in adapter.components().items():
        ranks = {update.rank for update in updates.values() if update.rank is not None}
        components[name] = ComponentSummary(
            modules=len(updates),
            kinds=dict(sorted(Counter(update.kind for update in updates.values()).items())),
            ranks=sorted(ranks),
            alphas=sorted({alphas[ModuleRef(name, p)] for p in updates if ModuleRef(name, p) in alphas}),
        )
    return InspectReport(
        regraft_version=__version__,
        file=str(path),
        format=adapter.format,
        family=adapter.family,
        components=components,
        tokens={str(token): list(ref.shape) for token, ref in adapter.tokens.items()},
        metadata=dict(adapter.metadata),
        unrecognised=list(adapter.unrecognised),
    )


def _alphas(adapter: Adapter) -> dict[ModuleRef, float]:
    """Alpha by module, where the file states one: as a tensor, or in a config."""
    low_rank = {module: u for module, u in adapter.updates.items() if isinstance(u, LowRank)}
    refs = {module: update.alpha for module, update in low_rank.items() if update.alpha is not None}
    alphas = {module: float(tensor.reshape(()).item()) for module, tensor in load_many(refs).items()}
    configs = component_configs(adapter.metadata, adapter.layout.get("unprefixed", ""))
    for module, update in low_rank.items():
        config = adapter.config if adapter.config is not None else configs.get(module.component)
        if module not in alphas and config is not None:
            alphas[module] = float(implied_alpha(update, rslora=bool(config.get("use_rslora"))))
    return alphas
