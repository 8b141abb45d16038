"""The same adapter in another file format: as it is, in another exact form, refactored on its base, or not at all.

What a format can hold is asked of its writer: each kind of update is given to it once, and what it refuses is tried in
another form. Before anything lies on disk, the result is read back and compared, so that no writer can forget a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from regraft._version import __version__
from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base, open_base
from regraft.errors import OutputError, UsageError
from regraft.families import family_of_base, get_family
from regraft.formats import get_format
from regraft.formats._factors import KEEP
from regraft.formats.peft import PREFIX
from regraft.metadata import strip_private, with_ranks
from regraft.ops._common import (
    BaseWeights,
    Factors,
    Ticker,
    cast,
    change_on,
    factored,
    for_target,
    no_ticker,
    read_whole,
)
from regraft.ops._writing import write_checked
from regraft.ops.held import Held
from regraft.ops.wholes import of_whole
from regraft.output import check_writable
from regraft.report.ops_schema import ConvertedModule, ConvertReport, Fate
from regraft.residual import changed_by, check_whole
from regraft.tensors import InMemory
from regraft.updates import Diff, Full, Ia3, LowRank, Update

#: Share of ‖ΔW‖² that a refactored change keeps, unless told otherwise.
ENERGY = 0.999
# A LoRA of such a share of the full rank saves nothing beside the weight itself.
_CLOSE_TO_FULL = 0.5


@dataclass(frozen=True)
class Form:
    """One way to hold a module's change in another format.

    Attributes:
        updates: what takes its place.
        status: as in the record.
        reason: in plain words.
        energy_kept: share of ‖ΔW‖², where it was refactored.
    """

    updates: Mapping[ModuleRef, Update]
    status: Fate
    reason: str
    energy_kept: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a conversion comes to.

    Attributes:
        adapter: as it is to be written; what would be lost is not in it.
        changes: the modules that are not kept as they are.
    """

    adapter: Adapter
    changes: tuple[ConvertedModule, ...]

    @property
    def lost(self) -> list[ConvertedModule]:
        return [row for row in self.changes if row.status == "lost"]


def plan_conversion(
    adapter: Adapter,
    format: str,
    base: Base | None = None,
    *,
    energy: float | None = None,
    dry_run: bool = False,
    tick: Ticker = no_ticker,
) -> Plan:
    """Decide for each module how the format is to hold it.

    Args:
        adapter: any.
        format: name of the target.
        base: what its changes are refactored on, where no exact form is held.
        energy: share of ‖ΔW‖² that this keeps; `ENERGY` unless given. Without a base, a weight's whole change
            (``.diff``) is refactored only if this is given.
        dry_run: don't compute what takes the base.
        tick: called before each module.
    """
    held = Held(adapter, get_format(format))
    forms = _Forms(adapter, base, energy, dry_run=dry_run)
    found: dict[ModuleRef, Form] = {}
    # Plain LoRA first: where a format holds one kind per file, it is the one to which others can be turned.
    order = sorted(adapter.updates, key=lambda ref: adapter.updates[ref].kind != "lora")
    for done, ref in enumerate(order):
        tick(done, len(order), str(ref))
        update = adapter.updates[ref]
        why = held.refusal({ref: update})
        if why is None:
            found[ref] = Form({ref: update}, "kept", "")
            continue
        other = next((form for form in forms.of(ref, update) if held.refusal(form.updates) is None), None)
        found[ref] = other or Form({}, "lost", why)
    updates = {name: update for ref in adapter.updates for name, update in found[ref].updates.items()}
    rows = [_row(ref, adapter.updates[ref], form) for ref, form in found.items() if form.status != "kept"]
    rows += held.lost_tokens()
    metadata = with_ranks(adapter.metadata, updates.values()) if rows else adapter.metadata
    return Plan(replace(adapter, updates=updates, metadata=metadata), tuple(rows))


def _row(ref: ModuleRef, update: Update, form: Form) -> ConvertedModule:
    new = next(iter(form.updates.values()), None)
    pending = form.status == "merged" and form.energy_kept is None
    return ConvertedModule(
        name=str(ref),
        kind=update.kind,
        becomes=new.kind if new is not None else None,
        status=form.status,
        rank_in=update.rank,
        rank_out=new.rank if new is not None and not pending else None,
        energy_kept=form.energy_kept,
        reason=form.reason,
    )


class _Forms:
    """Other forms of the same change, the best first."""

    def __init__(self, adapter: Adapter, base: Base | None, energy: float | None, *, dry_run: bool) -> None:
        self.adapter = adapter
        self.base = BaseWeights(base, adapter) if base is not None else None
        self.factors = Factors(adapter, self.base)
        self.energy, self.dry_run, self.taken = energy, dry_run, frozenset(adapter.updates)

    def of(self, ref: ModuleRef, update: Update) -> Iterator[Form]:
        """The forms, each made only when the ones before it were refused."""
        exact = self.factors.of(ref, update) if not update.by_parameter else None
        if exact is not None and exact is not update:
            reason = f"a {update.kind} equals a LoRA of rank {exact.rank}"
            yield Form({ref: exact}, "rewritten", reason)
        if exact is not None and exact.bias is not None and self._has_bias(ref):
            bias = exact.bias.load().float() * exact.scale
            path = f"{ref.path}.bias"
            parts: dict[ModuleRef, Update] = {
                ref: replace(exact, bias=None),
                ModuleRef(ref.component, path): Diff(InMemory(bias), path),
            }
            yield Form(parts, "rewritten", "the bias of B as a change of the layer's bias")
        if self.base is not None and self.base.find(ref) is not None:
            yield from self._on(self.base, ref, update)
        elif isinstance(update, Diff) and self.energy is not None:
            yield from self._factored(ref, update, None)

    def _on(self, base: BaseWeights, ref: ModuleRef, update: Update) -> Iterator[Form]:
        if isinstance(update, Full):
            change = change_on(base, ref, update)
            if not change.any():
                # PEFT saves targeted embeddings beside their update, as they are in the base.
                yield Form({}, "rewritten", "it is this base's own value, and changes nothing")
            yield Form({ref: Diff(InMemory(change), update.key)}, "rewritten", "its change from this base's value")
        elif not update.by_parameter and base.load(ref).dim() == 1:
            yield from self._of_norm(base, ref, update)
            return
        elif isinstance(update, Diff):
            value = base.load(ref) + update.delta().reshape(update.shape)
            yield Form(
                {ref: Full(InMemory(value), f"{PREFIX}{ref.path}")},
                "rewritten",
                "this base's value with the change in it",
            )
        yield from self._factored(ref, update, base)

    def _of_norm(self, base: BaseWeights, ref: ModuleRef, update: Update) -> Iterator[Form]:
        """A shift of a norm's weight as the change that it makes of it, and as the changed weight."""
        name, change = ModuleRef(ref.component, f"{ref.path}.weight"), change_on(base, ref, update)
        if name in self.taken:
            return
        yield Form({name: Diff(InMemory(change), f"{ref.path}.w_norm")}, "rewritten", "its change of this base's norm")
        value = InMemory(base.load(ref) + change)
        yield Form({name: Full(value, f"{PREFIX}{name.path}")}, "rewritten", "this base's norm with the change in it")

    def _factored(self, ref: ModuleRef, update: Update, base: BaseWeights | None) -> Iterator[Form]:
        """The change refactored as a LoRA; on a base, with everything in it that depends on the base."""
        if update.by_parameter and not (ref.path.endswith(".weight") and len(update.shape) > 1):
            return
        home = ModuleRef(ref.component, ref.path.removesuffix(".weight")) if update.by_parameter else ref
        if home != ref and home in self.taken:
            # Its module has an update of its own, whose place it would take.
            return
        if self.dry_run:
            shape = tuple(base.load(ref).shape) if base is not None else update.shape
            yield Form({home: _stub(shape)}, "merged", "to be refactored on the base")
            return
        change = change_on(base, ref, update) if base is not None else update.delta().reshape(update.shape)
        found, kept = factored(change, energy=self.energy or ENERGY, rank=None)
        full = min(change.shape[0], change[0].numel())
        reason = f"rank {found.rank} of {full}" + (", close to full" if found.rank > _CLOSE_TO_FULL * full else "")
        whole = "its change on this base" if base is not None else "its change"
        said = f"{whole}, as a LoRA of {reason}"
        bias = self._bias_change(ref, update)
        if bias is None:
            yield Form({home: found}, "merged", said, kept)
            return
        path = f"{home.path}.bias"
        yield Form({home: replace(found, bias=InMemory(bias))}, "merged", said, kept)
        if self._has_bias(ref):
            yield Form({home: found, ModuleRef(home.component, path): Diff(InMemory(bias), path)}, "merged", said, kept)

    def _has_bias(self, ref: ModuleRef) -> bool:
        """Whether the layer has a bias that can be changed, by the base or else by the family."""
        if self.base is not None:
            return self.base.bias(ref) is not None
        family = get_family(self.adapter.family)
        known = family.parameters.get(ref.component, {}) if family is not None else {}
        return f"{ref.path}.weight" not in known or f"{ref.path}.bias" in known

    def _bias_change(self, ref: ModuleRef, update: Update) -> Tensor | None:
        """What the update does to the layer's bias, (out,), or None: PEFT's ``lora_bias``, its IA3 on the base."""
        if isinstance(update, LowRank) and update.bias is not None:
            return update.bias.load().float() * update.scale
        found = self.base.bias(ref) if self.base is not None and isinstance(update, Ia3) else None
        if found is None or not isinstance(update, Ia3):
            return None
        bias = found.load().float()
        change = update.merged_bias(bias) - bias
        return change if bool(change.any()) else None


def _stub(shape: tuple[int, ...]) -> LowRank:
    tail = [1] * (len(shape) - 2)
    return LowRank(InMemory(torch.zeros(shape[0], 1, *tail)), InMemory(torch.zeros(1, *shape[1:])), 1.0)


def convert_adapter(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    base: str | Path | None = None,
    energy: float | None = None,
    private: bool = True,
    save_dtype: torch.dtype | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    tick: Ticker = no_ticker,
) -> ConvertReport:
    """Write an adapter in another format; nothing of it is left out.

    Args:
        source: a weights file, or a PEFT folder.
        target: a ``.safetensors`` file, or a folder for PEFT.
        format: as `regraft.formats` names them.
        base: un-flattens underscored names of families that regraft has no table of, and gives the weights on which
            what the format can't hold (a DoRA magnitude, IA3, OFT, GLoRA) is refactored as LoRA, and what PiSSA and
            OLoRA had taken out of it before the training is taken out of the adapter.
        energy: the share of ‖ΔW‖² that such a LoRA keeps.
        private: keep paths, names, prompts and tag lists of the header.
        save_dtype: of the output's tensors; by default the input's.
        dry_run: only plan; nothing is written, and nothing refactored.
        overwrite: replace what is there.
        tick: called before each module.

    Raises:
        InputError: the source can't be read, or holds NaN or Inf.
        OutputError: the format can't hold a part of it, or the target can't be written.
        UsageError: there is no such format, or the energy is no share.
    """
    get_format(format)
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy {energy} is no share", remedy="Give one such as 0.999.")
    target = Path(target).expanduser()
    if not dry_run:
        check_writable(target, overwrite=overwrite, source=Path(source).expanduser())
    opened = open_base(base) if base is not None else None
    adapter = for_target(read_whole(source, opened), target, format)
    if adapter.family is None and opened is not None:
        # Numbers per singular direction tell no shapes, and so no family.
        adapter = replace(adapter, family=family_of_base(opened))
    changed = changed_by(adapter)
    if opened is not None:
        adapter = of_whole(adapter, opened, dry_run=dry_run)
    elif format != adapter.format or adapter.layout.get("bare"):
        # PEFT's own configuration says of what base it is an update; nothing else can.
        check_whole(adapter)
    removed: list[str] = []
    if not private:
        adapter, removed = strip_private(adapter)
    notes = _notes(adapter, format)
    if changed is not None and opened is not None:
        notes.append(f"What {changed} had taken out of the base is taken out of the adapter, at twice the rank.")
    plan = plan_conversion(adapter, format, opened, energy=energy, dry_run=dry_run, tick=tick)
    if not dry_run:
        _check_none_lost(plan, adapter, format, based=opened is not None)
        ready = cast(plan.adapter, save_dtype)
        _, said = write_checked(ready, target, format, overwrite=overwrite)
        notes += said
    return ConvertReport(
        regraft_version=__version__,
        input=str(source),
        output=str(target),
        format=format,
        modules=len(plan.adapter.updates),
        changes=list(plan.changes),
        removed=removed,
        notes=notes,
        dry_run=dry_run,
    )


def _notes(adapter: Adapter, format: str) -> list[str]:
    if adapter.config is None or format == adapter.format:
        return []
    notes = ["PEFT's config stays behind: the other format has no place for its training fields."]
    if adapter.sidecars:
        notes.append(f"Files beside the weights stay behind: {', '.join(sorted(adapter.sidecars))}.")
    return notes


def _check_none_lost(plan: Plan, adapter: Adapter, format: str, *, based: bool) -> None:
    if not plan.lost:
        return
    first, count = plan.lost[0], len(plan.lost)
    more = f" ({count} modules in all; --dry-run lists them)" if count > 1 else ""
    # No base gives a plain LoRA a place.
    remedy = (
        KEEP if based or first.kind == "lora" else f"{KEEP.rstrip('.')}, or give the base with --base to refactor them."
    )
    raise OutputError(
        f"a {first.kind} would be lost{more}: {first.reason.rstrip('.')}",
        file=adapter.path,
        key=first.name,
        remedy=remedy,
    )
