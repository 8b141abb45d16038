"""Another rank for the same adapter: fewer by SVD, more by zeros.

Down: the best approximation of s · B A of that rank (Eckart–Young), through QR of both factors; ΔW is never built. Up:
columns of zeros, so that ΔW stays. The scale stays, so that alpha follows the rank: alpha = scale · rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from regraft._version import __version__
from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base, open_base
from regraft.carry import matches
from regraft.errors import OutputError, UsageError
from regraft.formats import get_format
from regraft.metadata import with_ranks
from regraft.ops._common import BaseWeights, Factors, Ticker, cast, no_ticker, read_whole
from regraft.ops._writing import write_checked
from regraft.output import check_writable
from regraft.report.ops_schema import ResizedModule, ResizeReport
from regraft.residual import check_whole
from regraft.transport import Transport
from regraft.updates import LowRank, Update


@dataclass(frozen=True)
class Sizes:
    """Which rank each module is to have.

    Attributes:
        rank: of all modules; beside ``energy``, the most that any may have. None with neither leaves a module as it is.
        energy: the share of each module's ‖ΔW‖² to keep, by as low a rank as does.
        per_module: (glob over module or block names, rank or share); the last that matches wins.
    """

    rank: int | None = None
    energy: float | None = None
    per_module: tuple[tuple[str, int | float], ...] = ()

    def of(self, ref: ModuleRef, family: str | None) -> int | float | None:
        """A rank, a share of the energy (a float), or None for no change."""
        given = [size for glob, size in self.per_module if matches(glob, ref, family)]
        return given[-1] if given else self.energy if self.energy is not None else self.rank


def resize(
    adapter: Adapter,
    sizes: Sizes,
    *,
    to_lora: bool = False,
    base: Base | None = None,
    tick: Ticker = no_ticker,
) -> tuple[Adapter, list[ResizedModule], float]:
    """The resized adapter, what became of each module, and the share of the whole ‖ΔW‖² that was kept.

    Args:
        adapter: any.
        sizes: what is wanted.
        to_lora: write LoHa, LoKr and Tucker modules as the LoRA that they equal, and resize that.
        base: tells the shapes of kernels that such files flatten, for families that regraft has no table of.
        tick: called before each module.

    Raises:
        InputError: the adapter is no update of the base as it was, see `regraft.residual`.
    """
    check_whole(adapter)
    updates: dict[ModuleRef, Update] = {}
    rows: list[ResizedModule] = []
    before = after = 0.0
    equal = Factors(adapter, BaseWeights(base, adapter) if base is not None else None)
    for done, (ref, update) in enumerate(adapter.updates.items()):
        tick(done, len(adapter.updates), str(ref))
        wanted = sizes.of(ref, adapter.family)
        factors = equal.of(ref, update) if to_lora else update
        if not isinstance(factors, LowRank):
            reason = _why_not(update)
            updates[ref], row = update, _row(ref, update, update, None, reason)
        elif wanted is None:
            updates[ref], row = update, _row(ref, update, update, 1.0, "not asked for")
        else:
            resized, kept = _resized(factors, wanted, sizes.rank if isinstance(wanted, float) else None)
            reason = f"a {update.kind} as the LoRA that it equals" if factors is not update else ""
            if update.magnitude is not None:
                reason = "the direction is resized, DoRA's magnitude stays"
            updates[ref], row = resized, _row(ref, update, resized, kept, reason)
            squared = factors.norm() ** 2
            before, after = before + squared, after + squared * kept
        rows.append(row)
    resized_adapter = replace(adapter, updates=updates, metadata=with_ranks(adapter.metadata, updates.values()))
    return resized_adapter, rows, after / before if before > 0 else 1.0


def _resized(update: LowRank, wanted: int | float, most: int | None) -> tuple[LowRank, float]:
    """The update with the wanted rank, and the share of ‖ΔW‖² that it keeps."""
    if wanted == update.rank and isinstance(wanted, int):
        return update, 1.0
    up, down = update.factors()
    moved = Transport().factors(up, down, wanted)
    if most is not None and moved.down.shape[0] > most:
        moved = Transport().factors(up, down, most)
    kept = 1.0 if moved.down.shape[0] >= update.rank else min(1.0, moved.energy_kept)
    if moved.down.shape[0] == update.rank:
        return update, 1.0
    return update.with_factors(moved.up, moved.down), kept


def _why_not(update: Update) -> str:
    if update.by_parameter or update.rank is None:
        return "has no rank"
    return f"a {update.kind} is not resized as one: --to-lora writes the LoRA that it equals, where there is one"


def _row(ref: ModuleRef, before: Update, after: Update, kept: float | None, reason: str) -> ResizedModule:
    return ResizedModule(
        name=str(ref),
        kind=before.kind,
        rank_in=before.rank,
        rank_out=after.rank,
        energy_kept=kept,
        reason=reason,
    )


def resize_adapter(
    source: str | Path,
    target: str | Path,
    sizes: Sizes,
    *,
    to_lora: bool = False,
    format: str | None = None,
    save_dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    tick: Ticker = no_ticker,
) -> ResizeReport:
    """Write an adapter with another rank.

    Args:
        source: a weights file, or a PEFT folder.
        target: a ``.safetensors`` file, or a folder for PEFT.
        sizes: which rank each module is to have.
        to_lora: write LoHa, LoKr and Tucker modules as the LoRA that they equal.
        format: of the output; by default the input's.
        save_dtype: of the output's tensors; by default the input's.
        base: names and shapes of families that regraft has no table of; no weight of it is read.
        overwrite: replace what is there.
        tick: called before each module.

    Raises:
        InputError: the source can't be read, or holds NaN or Inf.
        OutputError: no module has a rank, the format can't hold the result, or the target can't be written.
        UsageError: no size is asked for, it is out of range, or a glob matches no module.
    """
    _check(sizes)
    if format is not None:
        get_format(format)
    target = Path(target).expanduser()
    check_writable(target, overwrite=overwrite, source=Path(source).expanduser())
    opened = open_base(base) if base is not None else None
    adapter = read_whole(source, opened)
    _check_globs(sizes, adapter)
    resized, rows, kept = resize(adapter, sizes, to_lora=to_lora, base=opened, tick=tick)
    if not any(isinstance(update, LowRank) for update in resized.updates.values()):
        raise OutputError("no module of this file has factors to resize", file=source, remedy=_remedy(rows, to_lora))
    into = format or adapter.format
    written, _ = write_checked(cast(resized, save_dtype), target, into, overwrite=overwrite)
    left = sorted({row.kind for row in rows if row.energy_kept is None})
    notes = ["The scale of every module stays: alpha follows its rank."]
    notes += [f"Left as they are: {', '.join(left)}."] if left else []
    return ResizeReport(
        regraft_version=__version__,
        input=str(source),
        outputs=[str(file) for file in written],
        format=into,
        energy_kept=kept,
        modules=rows,
        notes=notes,
    )


def _check_globs(sizes: Sizes, adapter: Adapter) -> None:
    for glob, _ in sizes.per_module:
        if not any(matches(glob, ref, adapter.family) for ref in adapter.updates):
            remedy = f"Modules are named like {next(iter(adapter.updates), 'none')}."
            raise UsageError(f"--per-module: {glob!r} matches no module or block of the adapter", remedy=remedy)


def _remedy(rows: list[ResizedModule], to_lora: bool) -> str:
    kinds = ", ".join(sorted({row.kind for row in rows}))
    return f"It holds {kinds}." + ("" if to_lora else " --to-lora writes the LoRA that such a module equals, if any.")


def _check(sizes: Sizes) -> None:
    if sizes.rank is None and sizes.energy is None and not sizes.per_module:
        raise UsageError("no size is asked for", remedy="Give --rank 16, --energy 0.95 or --per-module '*attn*=8'.")
    if sizes.rank is not None and sizes.rank < 1:
        raise UsageError(f"--rank {sizes.rank} is below 1", remedy="Give one such as 16.")
    if sizes.energy is not None and not 0 < sizes.energy <= 1:
        raise UsageError(f"--energy {sizes.energy} is no share", remedy="Give one such as 0.95.")
