"""What an adapter file is, told from its header: format, family, components, ranks. No factor is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from regraft._version import __version__
from regraft.adapter import Adapter, ModuleRef
from regraft.base import open_base
from regraft.errors import OutputError
from regraft.formats import BaseNames, get_format, load_adapter
from regraft.formats._common import check_values, load_many
from regraft.formats._peft_config import implied_alpha
from regraft.formats.diffusers import component_configs
from regraft.output import check_writable
from regraft.report.schema import ComponentSummary, InspectReport, Record
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
        tokens={token: list(ref.shape) for token, ref in adapter.tokens.items()},
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


class ConvertReport(Record):
    """``regraft convert --json``."""

    input: str
    output: str
    format: str
    modules: int


def convert_adapter(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write an adapter in another format; nothing of it is left out.

    Args:
        source: a weights file, or a PEFT folder.
        target: a ``.safetensors`` file, or a folder for PEFT.
        format: ``peft``, ``diffusers``, ``kohya`` or ``cloneofsimo``.
        base: its module names un-flatten underscored names of families that regraft has no table of.
        overwrite: replace what is there.

    Raises:
        InputError: the source can't be read, or holds NaN or Inf.
        OutputError: the format can't hold a part of it, or the target can't be written.
        UsageError: there is no such format.
    """
    get_format(format)
    target = Path(target).expanduser()
    check_writable(target, overwrite=overwrite, source=Path(source).expanduser())
    adapter = load_adapter(source, names=base_names(base) if base is not None else None)
    if adapter.unrecognised:
        raise OutputError(
            f"{len(adapter.unrecognised)} keys are not understood and would be lost",
            file=source,
            key=adapter.unrecognised[0],
            remedy="If they are plain LoRA keys with underscored names, give the base with --base.",
        )
    if format == "peft" and adapter.format == "peft":
        adapter = replace(adapter, layout={**adapter.layout, "bare": target.suffix == ".safetensors"})
    check_values(adapter)
    adapter.save(target, format=format, overwrite=overwrite)
    return ConvertReport(input=str(source), output=str(target), format=format, modules=len(adapter.updates))


def base_names(base: str | Path) -> dict[str, tuple[str, ...]]:
    """Component → parameter names of a base, from its headers."""
    return {component: tuple(tensors) for component, tensors in open_base(base, whole=False).components.items()}
