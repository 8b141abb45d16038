"""Several adapters in one: W' = W + Σ weight · ΔW, exactly by concatenation, or cut to a rank by SVD.

Concatenation stacks the factors (rank = sum of ranks); it equals PEFT's ``add_weighted_adapter(…, "cat")``, and the
cut its ``"svd"``. What depends on the base's weight (DoRA's magnitude, IA3, OFT, GLoRA) has no ΔW of its own: beside
another change of the same module it takes the base, and is refactored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from regraft._version import __version__
from regraft.adapter import Adapter, ModuleRef, TokenRef
from regraft.base import Base, open_base
from regraft.errors import Refused, UsageError
from regraft.families import same_naming
from regraft.formats import get_format
from regraft.formats._peft_config import as_lora
from regraft.metadata import with_ranks
from regraft.ops._common import (
    BaseWeights,
    Factors,
    Ticker,
    aligned_names,
    beside,
    cast,
    change_on,
    factored,
    no_ticker,
    read_whole,
    same_tensors,
    saving_norms,
)
from regraft.ops._writing import write_checked
from regraft.ops.convert import plan_conversion
from regraft.output import check_writable
from regraft.plan import same_matrix
from regraft.report.ops_schema import MergedModule, MergeReport
from regraft.residual import check_whole
from regraft.settling import as_shifts
from regraft.tensors import InMemory, TensorRef
from regraft.transport import Transport
from regraft.updates import Diff, Full, LowRank, Update

How = Literal["concat", "svd"]


@dataclass(frozen=True)
class Settings:
    """How adapters are put together.

    Attributes:
        weights: a factor for each.
        how: ``concat``, or ``svd`` to ``rank`` or ``energy``.
        rank: of the result by SVD; by default the highest rank of the inputs in that module.
        energy: the share of ‖ΔW‖² to keep instead.
    """

    weights: tuple[float, ...]
    how: How = "concat"
    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class _Part:
    """One input's change of one module."""

    index: int
    weight: float
    ref: ModuleRef
    update: Update


def merge(
    adapters: Sequence[Adapter], settings: Settings, base: Base | None = None, *, tick: Ticker = no_ticker
) -> tuple[Adapter, list[MergedModule]]:
    """The merged adapter, in the spelling of the first one, and what became of each module.

    Args:
        adapters: two or more, of one family.
        settings: weights and way.
        base: for what has no ΔW of its own.
        tick: called before each module.

    Raises:
        Refused: they are for different families, or a module can't be merged as asked.
        InputError: one is no update of the base as it was, see `regraft.residual`.
    """
    _check_families(adapters)
    for adapter in adapters:
        check_whole(adapter)
    names = aligned_names(adapters)
    parts: dict[ModuleRef, list[_Part]] = {}
    for index, adapter in enumerate(adapters):
        for ref, update in adapter.updates.items():
            part = _Part(index, settings.weights[index], ref, update)
            parts.setdefault(names[index][ref], []).append(part)
    merger = _Merger(adapters, settings, base)
    updates: dict[ModuleRef, Update] = {}
    rows: list[MergedModule] = []
    for done, (name, here) in enumerate(parts.items()):
        tick(done, len(parts), str(name))
        spelt = here[0].ref if here[0].index == 0 else name
        merged, row = merger.merge(spelt, here)
        if merged.by_parameter and not here[0].update.by_parameter:
            spelt = ModuleRef(spelt.component, f"{spelt.path}.weight")
            if ModuleRef(name.component, f"{name.path}.weight") in parts:
                raise Refused(
                    "one of the inputs shifts this norm, and another holds its change: they can't be added up",
                    file=adapters[here[0].index].path,
                    key=str(spelt),
                    remedy="`regraft convert --base` first makes changes of the shifts.",
                )
        updates[spelt] = merged
        rows.append(row)
    first = adapters[0]
    metadata = {
        key: value for key, value in first.metadata.items() if all(a.metadata.get(key) == value for a in adapters[1:])
    }
    whole = replace(
        first,
        updates=updates,
        metadata=with_ranks(metadata, updates.values()),
        config=_config(adapters),
        tokens=_tokens(adapters),
        sidecars={name: file for name, file in first.sidecars.items() if name != "README.md"},
        path=None,
    )
    return whole, rows


def _check_families(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        if not same_naming(first.family, other.family):
            raise Refused(
                f"is for {other.family}, and {first.path} for {first.family}: adapters of different models can't be "
                "merged",
                file=other.path,
                remedy="`regraft port` carries one over first.",
            )


def _config(adapters: Sequence[Adapter]) -> dict[str, Any] | None:
    """The first one's PEFT config, with every input's ``modules_to_save``."""
    if adapters[0].config is None:
        return None
    saved = [name for adapter in adapters for name in (adapter.config or {}).get("modules_to_save") or ()]
    # With rsLoRA, a scale of 1 would be written as an alpha of √r.
    config = {**adapters[0].config, "use_rslora": False}
    return {**config, "modules_to_save": list(dict.fromkeys(saved))} if saved else config


def _tokens(adapters: Sequence[Adapter]) -> dict[TokenRef, TensorRef]:
    tokens: dict[TokenRef, TensorRef] = {}
    for adapter in adapters:
        for token, ref in adapter.tokens.items():
            if token in tokens and not same_tensors({"": tokens[token]}, {"": ref}):
                raise Refused(
                    "two of the inputs have different embeddings for this token",
                    file=adapter.path,
                    key=str(token),
                    remedy="Rename the token in one of them.",
                )
            tokens[token] = ref
    return tokens


class _Merger:
    def __init__(self, adapters: Sequence[Adapter], settings: Settings, base: Base | None) -> None:
        self.adapters, self.settings = adapters, settings
        self.bases = [BaseWeights(base, adapter) for adapter in adapters] if base is not None else None
        self.factors = [Factors(adapter, self.bases[i] if self.bases else None) for i, adapter in enumerate(adapters)]

    def merge(self, name: ModuleRef, parts: list[_Part]) -> tuple[Update, MergedModule]:
        """One module's change from all inputs that have one."""
        self._check_shapes(parts)
        kept: float | None = None
        if len(parts) == 1 and (parts[0].weight == 1.0 or parts[0].update.additive):
            how, merged = "alone", _weighted(parts[0])
        elif all(part.update.additive for part in parts):
            how, merged, kept = self._sum(parts)
        elif _all_equal(parts) and sum(part.weight for part in parts) == 1.0:
            how, merged = "alone", parts[0].update
        else:
            how, merged, kept = self._through_base(name, parts)
        row = MergedModule(
            name=str(name),
            inputs=[part.index for part in parts],
            kinds=[part.update.kind for part in parts],
            how=how,
            rank_in=[part.update.rank for part in parts],
            rank_out=merged.rank,
            energy_kept=kept,
        )
        return merged, row

    def _check_shapes(self, parts: list[_Part]) -> None:
        first = parts[0]
        for part in parts[1:]:
            one, two = first.update.shape, part.update.shape
            # IA3 and the like tell no whole shape.
            if len(one) > 1 and len(two) > 1 and not same_matrix(one, two) and _flat(one) != _flat(two):
                raise Refused(
                    f"changes a weight of shape {list(two)}, and {self.adapters[first.index].path} one of "
                    f"{list(one)}: they are for different models",
                    file=self.adapters[part.index].path,
                    key=str(part.ref),
                    remedy="`regraft port` carries one over first.",
                )

    def _sum(self, parts: list[_Part]) -> tuple[str, Update, float | None]:
        """Σ weight · ΔW of parts that need no base."""
        factors = [self.factors[part.index].of(part.ref, part.update) for part in parts]
        known = [factor for factor in factors if factor is not None]
        if len(known) == len(parts):
            merged = concatenated(known, [part.weight for part in parts])
            if self.settings.how == "concat":
                return "concatenated", merged, None
            cut, kept = self._cut(merged, max(part.update.rank or 0 for part in parts))
            return "svd", cut, kept
        total = sum(
            (part.weight * part.update.delta().reshape(parts[0].update.shape) for part in parts), torch.zeros(())
        )
        return "sum", self._whole(parts, total), None

    def _whole(self, parts: list[_Part], total: Tensor) -> Update:
        """A summed change stored whole, as the first part that is stored so."""
        like = next((part.update for part in parts if isinstance(part.update, Diff)), None)
        if like is None:
            found, _ = factored(total, energy=1.0, rank=None)
            return found
        return replace(like, value=InMemory(total.to(like.value.dtype).contiguous()))

    def _cut(self, merged: LowRank, usual: int) -> tuple[LowRank, float]:
        wanted = self.settings.energy if self.settings.energy is not None else (self.settings.rank or usual)
        if isinstance(wanted, int) and wanted >= merged.rank:
            return merged, 1.0
        up, down = merged.factors()
        moved = Transport().factors(up, down, wanted)
        return merged.with_factors(moved.up, moved.down), min(1.0, moved.energy_kept)

    def _through_base(self, name: ModuleRef, parts: list[_Part]) -> tuple[str, Update, float | None]:
        """Σ weight · (W' − W) on the base, whole or refactored."""
        bound = next(part for part in parts if not part.update.additive)
        if self.bases is None:
            doing = "scaled" if len(parts) == 1 else "merged with another change"
            what = "DoRA" if bound.update.magnitude is not None else bound.update.kind
            raise Refused(
                f"{what} depends on the base's weight and can't be {doing} without it",
                file=self.adapters[bound.index].path,
                key=str(bound.ref),
                remedy="Give the base with --base.",
            )
        changes = [part.weight * change_on(self.bases[part.index], part.ref, part.update) for part in parts]
        total = sum(changes[1:], changes[0])
        whole = next((part.update for part in parts if isinstance(part.update, Full)), None)
        if whole is not None:
            weight = self.bases[parts[0].index].load(parts[0].ref)
            return "base", whole.with_value(weight + total), None
        if total.dim() == 1:
            # Shifts of a norm's weight.
            value = total.to(_dtype([part.update for part in parts])).contiguous()
            return "base", Diff(InMemory(value), f"{name.path}.w_norm"), None
        energy = self.settings.energy
        rank = self.settings.rank if energy is None else None
        found, kept = factored(total, energy=energy if energy is not None or rank else 0.999, rank=rank)
        return "base", found.cast(_dtype([part.update for part in parts])), kept


def _weighted(part: _Part) -> Update:
    """weight · ΔW of one input; a LoRA's factors stay, and its scale takes the weight."""
    if part.weight == 1.0:
        return part.update
    if isinstance(part.update, LowRank):
        return replace(part.update, scale=part.update.scale * part.weight)
    return part.update.scaled(part.weight)


def concatenated(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ weight · ΔW as one update of the summed rank.

    Equal factors weight · scale are kept as the scale, and the factors' bytes with them; else ``up`` takes them.
    """
    first = updates[0]
    factors = [weight * update.scale for weight, update in zip(weights, updates, strict=True)]
    scale = factors[0] if len(set(factors)) == 1 and factors[0] != 0 else 1.0
    shares = [factor / scale for factor in factors]
    dtype = _dtype(updates)
    tail = [1] * (len(first.shape) - 2)
    ups, downs = [], []
    for update, share in zip(updates, shares, strict=True):
        up = update.up.load().flatten(1)
        ups.append((up if share == 1.0 else up.float() * share).to(dtype))
        downs.append(update.down.load().flatten(1).to(dtype))
    up, down = torch.cat(ups, dim=1), torch.cat(downs)
    biases = [(u, share) for u, share in zip(updates, shares, strict=True) if u.bias is not None]
    bias = sum((share * u.bias.load().float() for u, share in biases if u.bias is not None), torch.zeros(()))
    return LowRank(
        InMemory(up.reshape(first.shape[0], down.shape[0], *tail).contiguous()),
        InMemory(down.reshape(down.shape[0], *first.shape[1:]).contiguous()),
        scale,
        alpha=next((update.alpha for update in updates if update.alpha is not None), None),
        bias=InMemory(bias.to(dtype)) if biases else None,
        orientation=first.orientation,
    )


def _dtype(updates: Sequence[Update]) -> torch.dtype:
    """The narrowest dtype that holds every input's factors."""
    dtypes = [ref.dtype for u in updates for role, ref in u.parts().items() if role not in ("alpha", "on_input")]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _all_equal(parts: Sequence[_Part]) -> bool:
    one, others = parts[0].update, [part.update for part in parts[1:]]
    alike = all(other.kind == one.kind and beside(other) == beside(one) for other in others)
    return alike and all(same_tensors(one.parts(), other.parts()) for other in others)


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    # LoHa and LoKr may store a kernel flattened.
    size = 1
    for n in shape[1:]:
        size *= n
    return shape[0], size


def merge_adapters(
    sources: Sequence[str | Path],
    target: str | Path,
    settings: Settings,
    *,
    base: str | Path | None = None,
    format: str | None = None,
    save_dtype: torch.dtype | None = None,
    overwrite: bool = False,
    tick: Ticker = no_ticker,
) -> MergeReport:
    """Write several adapters as one.

    Args:
        sources: two or more, of any format.
        target: a ``.safetensors`` file, or a folder for PEFT.
        settings: weights and way.
        base: their base, for DoRA and other kinds that depend on its weight.
        format: of the output; by default the first one's.
        save_dtype: of the output's tensors; by default the widest of the inputs.
        overwrite: replace what is there.
        tick: called before each module.

    Raises:
        InputError: a source can't be read, or holds NaN or Inf.
        OutputError: the format can't hold the result, or the target can't be written.
        Refused: they are for different families, or a module can't be merged as asked.
        UsageError: fewer than two sources, or weights that don't match them.
    """
    _check(sources, settings)
    if format is not None:
        get_format(format)
    target = Path(target).expanduser()
    for source in sources:
        check_writable(target, overwrite=overwrite, source=Path(source).expanduser())
    opened = open_base(base) if base is not None else None
    adapters = [read_whole(source, opened) for source in sources]
    merged, rows = merge(adapters, settings, opened, tick=tick)
    into = format or merged.format
    kinds = {type(update) for update in merged.updates.values()}
    shifts = as_shifts(merged, merged.updates, opened) if into == "peft" and opened is not None else None
    if shifts is not None:
        merged = shifts
    elif into == "peft" and opened is not None and {Diff, LowRank} <= kinds:
        # PEFT holds a norm whole.
        plan = plan_conversion(merged, into, opened, energy=1.0)
        merged = merged if plan.lost else plan.adapter
        if merged.config is not None:
            made = [ref for ref, update in merged.updates.items() if isinstance(update, Full)]
            merged = saving_norms(replace(merged, config=as_lora(merged.config)), opened, made)
    written, _ = write_checked(cast(merged, save_dtype), target, into, overwrite=overwrite)
    rebuilt = [row for row in rows if row.how == "base"]
    notes = []
    if rebuilt:
        notes.append(f"{len(rebuilt)} modules depend on the base's weight: the change on this base, refactored.")
    return MergeReport(
        regraft_version=__version__,
        inputs=[str(source) for source in sources],
        weights=list(settings.weights),
        outputs=[str(file) for file in written],
        format=into,
        how=settings.how,
        modules=rows,
        notes=notes,
    )


def _check(sources: Sequence[str | Path], settings: Settings) -> None:
    if len(sources) < 2:
        raise UsageError("one adapter alone is nothing to merge", remedy="Name two or more.")
    if len(settings.weights) != len(sources):
        given = ", ".join(f"{weight:g}" for weight in settings.weights)
        raise UsageError(f"--weights {given} does not fit {len(sources)} adapters", remedy="Give one for each.")
    if settings.how == "concat" and (settings.rank is not None or settings.energy is not None):
        raise UsageError("a concatenation has the sum of the ranks", remedy="For another one, add --how svd.")
    if settings.rank is not None and settings.rank < 1:
        raise UsageError(f"--rank {settings.rank} is below 1", remedy="Give one such as 16.")
    if settings.energy is not None and not 0 < settings.energy <= 1:
        raise UsageError(f"--energy {settings.energy} is no share", remedy="Give one such as 0.95.")
