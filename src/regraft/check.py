"""Will it survive? The plan and the diagnostics, without an output file."""

from __future__ import annotations

from typing import Any, Literal

from regraft._version import __version__
from regraft.adapter import Adapter
from regraft.base import Base
from regraft.fitting import Ticker
from regraft.forecast import FLOOR, Judgement
from regraft.forecast.probing import probed
from regraft.forecast.survey import Surveyor
from regraft.forecast.verdict import other_family
from regraft.methods.auto import looks_further
from regraft.methods.task import Running
from regraft.migration import Migration
from regraft.plan import Selection
from regraft.port import fit_for
from regraft.prediction import Prediction, of_base, of_family, of_metadata, warnings_of
from regraft.prepare import Preparation, prepare
from regraft.report.schema import CheckedModule, CheckReport, Status

_FURTHER = "`port` also runs both bases, and takes what is clearly better on held-out inputs"


def check(
    adapter: Adapter,
    old: Base | None,
    new: Base,
    method: str = "auto",
    *,
    selection: Selection = Selection(),
    deep: bool = False,
    probe: Running | None = None,
    tick: Ticker | None = None,
    **options: Any,
) -> CheckReport:
    """Judge an adapter on a pair of bases; see `regraft.forecast` for the rules.

    Args:
        adapter: as it was read.
        old: the base that it was trained on.
        new: the base that it is to run on.
        method: that it would be carried by.
        selection: which of its modules.
        deep: survey all modules of both bases, in place of a fixed sample.
        probe: how to run both models over self-made inputs, for a sharper forecast; None runs none.
        tick: called with (modules done, modules in all, module's name).
        **options: of the method.

    Raises:
        Refused: the adapter is for another family than its old base.
        InputError, UsageError: see `regraft.port.fit_for`.
    """
    migration = fit_for(adapter, old, new, method, selection=selection, tick=tick, **options)
    return check_migration(adapter, migration, selection, old, new, deep=deep, probe=probe)


def check_migration(
    adapter: Adapter,
    migration: Migration,
    selection: Selection = Selection(),
    old: Base | None = None,
    new: Base | None = None,
    *,
    deep: bool = False,
    probe: Running | None = None,
    weights_only: bool = False,
    surveyor: Surveyor | None = None,
) -> CheckReport:
    """The same with a fitted migration; ``weights_only`` and ``surveyor`` as `regraft.prepare.prepare` takes them.

    Raises:
        UsageError: the models are to be run, and one of the bases was not given.
    """
    ready = prepare(adapter, migration, selection, old, new, deep=deep, weights_only=weights_only, surveyor=surveyor)
    if probe is not None:
        ready = probed(adapter, ready, old, new, probe)
    judgement = ready.judgement
    problems = [f"{key}: {why}" for key, why in ready.problems.items()]
    if len(problems) > 5:
        problems[5:] = [f"… and {len(problems) - 5} more like these"]
    # A refusal is the first thing to know; else what stops the port is.
    refused = judgement.verdict == "refused"
    reasons = [*judgement.reasons, *problems] if refused else [*problems, *judgement.reasons]
    if any(base is not None and base.partial for base in (old, new)):
        reasons.append("the weights were compared by a sample of their rows, read from the hub")
    # A saved migration has its method.
    auto = migration.method == "auto" and migration.file is None and old is not None and new is not None
    further = auto and not (refused or weights_only) and looks_further(migration.used, judgement.distance)
    return CheckReport(
        regraft_version=__version__,
        input=str(adapter.path),
        verdict=judgement.verdict,
        summary=judgement.summary if refused else f"{_unfit(len(ready.problems))}{judgement.summary}",
        reasons=reasons,
        tier=_tier(judgement, migration),
        method=migration.used,
        method_note=_FURTHER if further else "",
        forecast=judgement.forecasts,
        similarity=judgement.similarity,
        distance=judgement.distance,
        modules=_rows(adapter, ready),
        source=migration.source,
        target=migration.target,
        warnings=_warnings(adapter, migration, old, new),
    )


def _tier(judgement: Judgement, migration: Migration) -> Literal["port", "refine", "bridge"]:
    """The cheapest tier that is expected to do."""
    if judgement.verdict != "refused":
        return "port" if judgement.verdict == "survives" else "refine"
    refine = judgement.forecasts.refine
    if refine is not None:
        return "refine" if refine.recovery >= FLOOR else "bridge"
    # No forecast is fitted for it; of what was measured (docs/refine-benchmark.md), bases trained from scratch and
    # other tokenizers came to 0.79 to 0.92 of a native adapter. A module of another family has no name to go by.
    old, new = migration.source, migration.target
    return "bridge" if old is None or other_family(old, new) else "refine"


def _warnings(adapter: Adapter, migration: Migration, old: Base | None, new: Base | None) -> list[str]:
    """What weights don't show: a change of what the models predict."""
    before, after = (
        _predicted(base, summary.family if summary else None)
        for base, summary in ((old, migration.source), (new, migration.target))
    )
    # Where the old base is not at hand, the adapter's header may say what it was trained to predict.
    return warnings_of(of_metadata(adapter.metadata) or before if old is None else before, after)


def _predicted(base: Base | None, family: str | None) -> Prediction | None:
    return of_base(base.path, family) if base is not None else of_family(family)


def _unfit(problems: int) -> str:
    if not problems:
        return ""
    what = "1 key or module" if problems == 1 else f"{problems} keys or modules"
    return f"{what} can't be carried: a port fails, unless --allow-partial leaves them behind. "


def _rows(adapter: Adapter, ready: Preparation) -> list[CheckedModule]:
    rows = []
    refused = ready.judgement.verdict == "refused"
    for ref in adapter.updates:
        home = ready.located.modules.get(ref)
        entry = ready.migration.entries.get(home) if home is not None else None
        near = ready.evidence.nearness.get(ref)
        target: str | None = None
        status: Status
        if ref in ready.left_out:
            status, reason = "skipped", ready.left_out[ref]
        elif ref in ready.evidence.skipped or ref in ready.located.missing:
            status, reason = "skipped", ready.evidence.skipped.get(ref) or ready.located.missing[ref]
        elif str(ref) in ready.problems:
            status, reason = "refused", ready.problems[str(ref)]
        else:
            whole = "stored whole" if adapter.updates[ref].by_parameter else "the shift of a norm"
            status, reason = "ported", entry.reason if entry else f"{whole}: carried as its change"
            target = str(entry.target) if entry is not None and entry.target is not None else str(ref)
            if refused:
                status, reason = "refused", "the adapter as a whole is refused"
        rows.append(
            CheckedModule(
                name=str(ref),
                target=target,
                status=status,
                reason=reason,
                similarity=near.similarity if near else None,
                distance=near.distance if near else None,
                adapter_distance=near.adapter_distance if near else None,
                share=ready.evidence.shares.get(ref),
            )
        )
    return rows
