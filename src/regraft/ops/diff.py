"""Two adapters beside each other, module by module: how large either change is, and the angle between them.

⟨ΔW, ΔW'⟩ = s s' · Σ (Bᵀ B') ∘ (A A'ᵀ): through r × r' Gram matrices, so that no ΔW is built for LoRA.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path

from regraft._version import __version__
from regraft.adapter import Adapter, ModuleRef
from regraft.base import open_base
from regraft.ops._common import Ticker, aligned_names, beside, no_ticker, read, same_tensors
from regraft.report.ops_schema import ComparedModule, DiffReport
from regraft.updates import Full, Update
from regraft.updates.exact import as_lowrank


def diff_adapters(
    first: str | Path, second: str | Path, *, base: str | Path | None = None, tick: Ticker = no_ticker
) -> DiffReport:
    """Compare two adapters of any formats; nothing is written.

    Args:
        first: a weights file, or a PEFT folder.
        second: likewise.
        base: names of families that regraft has no table of; no weight of it is read.
        tick: called before each module.

    Raises:
        InputError: one can't be read, or holds NaN or Inf.
    """
    opened = open_base(base) if base is not None else None
    one, two = read(first, opened), read(second, opened)
    return compare(one, two, names=(str(first), str(second)), tick=tick)


def compare(one: Adapter, two: Adapter, *, names: tuple[str, str], tick: Ticker = no_ticker) -> DiffReport:
    """The record of two adapters that were read already."""
    ours, theirs = ({name: ref for ref, name in named.items()} for named in aligned_names((one, two)))
    both = [name for name in ours if name in theirs]
    rows = []
    for done, name in enumerate(both):
        tick(done, len(both), str(name))
        rows.append(_compared(ours[name], one.updates[ours[name]], two.updates[theirs[name]]))
    rows.sort(key=lambda row: (-(row.distance if row.distance is not None else -1.0), row.name))
    only = (
        {name: one.updates[ours[name]] for name in ours if name not in theirs},
        {name: two.updates[theirs[name]] for name in theirs if name not in ours},
    )
    alone = [sum(norm**2 for update in part.values() if (norm := _norm(update)) is not None) for part in only]
    total = [sum((row.norms[i] or 0.0) ** 2 for row in rows) for i in (0, 1)]
    inner = sum((row.cosine or 0.0) * (row.norms[0] or 0.0) * (row.norms[1] or 0.0) for row in rows)
    tokens = sorted(one.tokens.keys() ^ two.tokens.keys())
    return DiffReport(
        regraft_version=__version__,
        first=names[0],
        second=names[1],
        formats=(one.format, two.format),
        families=(one.family, two.family),
        cosine=inner / sqrt(total[0] * total[1]) if total[0] * total[1] > 0 else None,
        norms=(sqrt(total[0] + alone[0]), sqrt(total[1] + alone[1])),
        distance=sqrt(sum((row.distance or 0.0) ** 2 for row in rows) + sum(alone)),
        equal=sum(row.equal for row in rows),
        only_first=[str(ours[name]) for name in only[0]] + [token for token in tokens if token in one.tokens],
        only_second=[str(theirs[name]) for name in only[1]] + [token for token in tokens if token in two.tokens],
        modules=rows,
        metadata=_metadata(one, two),
    )


def _metadata(one: Adapter, two: Adapter) -> dict[str, tuple[str | None, str | None]]:
    keys = sorted(one.metadata.keys() | two.metadata.keys())
    values = {key: (one.metadata.get(key), two.metadata.get(key)) for key in keys}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def _compared(name: ModuleRef, one: Update, two: Update) -> ComparedModule:
    equal = one.kind == two.kind and same_tensors(one.parts(), two.parts()) and beside(one) == beside(two)
    norms: tuple[float | None, float | None] = (_norm(one), _norm(two))
    cosine: float | None = None
    distance: float | None = None
    reason = ""
    if equal:
        distance, cosine = 0.0, 1.0 if norms[0] else None
    elif isinstance(one, Full) and isinstance(two, Full) and one.shape == two.shape:
        distance = float((one.value.load().double() - two.value.load().double()).norm())
        reason = "stored whole: the distance of the values"
    elif norms[0] is None or norms[1] is None:
        reason = "depends on the base's weight: only told whether it is the same"
    elif one.shape[0] != two.shape[0] or _size(one) != _size(two):
        reason = f"shapes {list(one.shape)} and {list(two.shape)}: for different bases"
    else:
        inner = _inner(one, two)
        squared = norms[0] ** 2 + norms[1] ** 2 - 2 * inner
        distance = sqrt(max(0.0, squared))
        cosine = max(-1.0, min(1.0, inner / (norms[0] * norms[1]))) if norms[0] * norms[1] > 0 else None
    if not equal and (one.magnitude is not None or two.magnitude is not None):
        reason = "; ".join(part for part in (reason, _magnitudes(one, two)) if part)
    return ComparedModule(
        name=str(name),
        kinds=(one.kind, two.kind),
        ranks=(one.rank, two.rank),
        norms=norms,
        cosine=cosine,
        distance=distance,
        equal=equal,
        reason=reason,
    )


def _norm(update: Update) -> float | None:
    """‖ΔW‖ without DoRA's magnitude, or None where it depends on the base."""
    try:
        return update.norm()
    except ValueError:
        return None


def _inner(one: Update, two: Update) -> float:
    """⟨ΔW, ΔW'⟩ in float64."""
    first, second = as_lowrank(one), as_lowrank(two)
    if first is None or second is None:
        return float((one.delta().double().flatten() * two.delta().double().flatten()).sum())
    up, down = (factor.double() for factor in first.factors())
    up2, down2 = (factor.double() for factor in second.factors())
    return first.scale * second.scale * float(((up.T @ up2) * (down @ down2.T)).sum())


def _size(update: Update) -> int:
    size = 1
    for n in update.shape:
        size *= n
    return size


def _magnitudes(one: Update, two: Update) -> str:
    if one.magnitude is None or two.magnitude is None:
        return "DoRA in only one of them"
    a, b = one.magnitude.load().double().flatten(), two.magnitude.load().double().flatten()
    if a.shape != b.shape:
        return "DoRA magnitudes along different axes"
    return f"DoRA magnitudes differ by {float((a - b).norm() / a.norm()):.2%}"
