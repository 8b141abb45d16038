"""The verdict: will this adapter survive on the new base? From the calibrated forecast, and from what rules a port out.

`judge` is the one place of verdicts: `check` and `port` both ask it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from regraft.adapter import Adapter
from regraft.families import same_naming
from regraft.forecast.calibration import Calibration, shipped
from regraft.forecast.evidence import Evidence
from regraft.forecast.features import Stage, features, stage_of
from regraft.lineage import ports_of
from regraft.lineage.fit import other_base
from regraft.migration import Migration
from regraft.report.schema import BaseSummary, Forecast, Forecasts, Verdict

#: A port is refused where not even the top of the forecast's interval reaches this share of a native adapter's gain,
#: or where weights are unrelated and nothing is forecast.
FLOOR = 0.2
#: From this forecast on, an adapter survives; below it, part of it does, and a refine is advised.
SURVIVES = 0.7
# Below this similarity, old and new weights have no more to do with each other than by chance or a distant start.
_RELATED = 0.5
# A forecast of less than this is one of nothing.
_NOTHING = 0.05
# From this share on, the drift from old to new is (or holds) the adapter itself.
_CONTAINED = 0.5
# Modules that drifted by more than this are named.
_DRIFTED = 0.25
# A port that leaves more than this share of the update behind needs a refine to make up for it.
_SKIPPED = 0.1
# Methods that carry an adapter between unrelated weights; until one was measured, nothing is forecast of it.
_CROSSING = ("stream",)
# What a person may do where the method at hand is refused, from cheap to strong.
_OTHER_WAYS = {
    "effect": "`--method effect` runs both models on self-made inputs and matches the adapter's effect layer by layer",
    "stream": "`--method stream` runs both models on self-made inputs and matches the adapter's effect on the stream",
    "refine": "a refine distils the old base with the adapter into the new one",
}


@dataclass(frozen=True)
class Judgement:
    """A verdict with its reasons.

    Attributes:
        verdict: ``survives``, ``refine`` or ``refused``.
        summary: in a sentence.
        reasons: each in a sentence, the weightiest first.
        similarity: mean over modules, weighted by their share of ‖ΔW‖²; None where no weights were compared.
        distance: likewise, the relative drift.
        forecasts: what to expect, by tier.
        advice: of a refusal: which tier would work.
    """

    verdict: Verdict
    summary: str
    reasons: tuple[str, ...] = ()
    similarity: float | None = None
    distance: float | None = None
    forecasts: Forecasts = field(default_factory=Forecasts)
    advice: str = ""


def judge(
    adapter: Adapter, migration: Migration, evidence: Evidence, calibration: Calibration | None = None
) -> Judgement:
    """The verdict for one adapter on one migration.

    Args:
        adapter: as it was read, so that its lineage counts.
        migration: fitted for it, or read from a file.
        evidence: by the adapter's own module names.
        calibration: by default the package's own.
    """
    near = evidence.nearness
    similarity = evidence.mean({ref: n.similarity for ref, n in near.items()}, missing=0.0)
    distance = evidence.mean({ref: n.distance for ref, n in near.items()})
    known = migration.source is not None and bool(near or evidence.skipped)
    forecasts = forecast(migration, evidence, calibration or shipped()) if known else Forecasts()

    ruled_out = list(_ruled_out(adapter, migration, evidence))
    refusals = [*ruled_out, *_hopeless(migration, evidence, forecasts.port, similarity)]
    if refusals:
        advice = _advice(forecasts, crossing=not ruled_out) if not _by_itself(refusals[0]) else ""
        reasons = (*refusals, *([advice] if advice else []))
        return Judgement("refused", f"Refused: {refusals[0]}.", reasons, similarity, distance, forecasts, advice)

    reasons = tuple(_reasons(migration, evidence, forecasts.port, similarity, distance))
    if similarity is None:
        summary = "Not judged: without the old base's weights nothing says how far the new one drifted."
        return Judgement("refine", summary, reasons, forecasts=forecasts)
    port = forecasts.port
    if port is None or port.recovery < SURVIVES or evidence.removed > _SKIPPED:
        summary = "Part of it should survive: carry it over, measure it with `verify`, and expect to refine it."
        return Judgement("refine", summary, reasons, similarity, distance, forecasts)
    summary = "It should survive: the new base is near where the adapter needs it."
    return Judgement("survives", summary, reasons, similarity, distance, forecasts)


def forecast(migration: Migration, evidence: Evidence, calibration: Calibration) -> Forecasts:
    """What to expect of each tier, from the last stage that the evidence reaches."""
    figures = features(evidence)
    stage = stage_of(figures)
    tiers = {name: calibration.forecast(name, figures, stage) for name in ("effect", "stream", "refine", "bridge")}
    return Forecasts(port=_of_method(migration, evidence, calibration, figures, stage), **tiers)


def _of_method(
    migration: Migration, evidence: Evidence, calibration: Calibration, figures: dict[str, float], stage: Stage
) -> Forecast | None:
    """The forecast for the method at hand; a rotation is to bring about a copy between aligned bases."""
    # `auto` may decide once more when it sees the adapter: what counts is what was asked for.
    ways = ["copy"] if evidence.rotated else [migration.method, migration.used]
    for way in ways:
        if (found := calibration.forecast(way, figures, stage)) is not None:
            return found
    # Of a method that needs no module to answer to another, weights say nothing.
    return None if migration.used in _CROSSING else calibration.forecast("copy", figures, stage)


def _ruled_out(adapter: Adapter, migration: Migration, evidence: Evidence) -> Iterable[str]:
    """What rules a port out, whatever it might carry."""
    ports = ports_of(adapter)
    if ports:
        yield (
            f"the adapter is itself a port (by {ports[-1].get('method', 'an unknown method')}); a port of a "
            "port loses twice: port the original"
        )
    old, new = migration.source, migration.target
    if old is not None and (told := other_base(adapter, old)) is not None:
        yield told
    if old is not None and other_family(old, new):
        yield f"the old base is {old.family}, the new one {new.family}: another family"
    if evidence.survey is not None and evidence.survey.untrained:
        yield "the new base looks untrained: its weights are like random draws, and there is nothing to adapt"
    contained = evidence.contained()
    if contained is not None and contained > _CONTAINED:
        yield f"the new base already contains this adapter (about {contained:.0%} of it is merged into its weights)"
    placeless = bool(evidence.shares) and len(evidence.skipped) == len(evidence.shares)
    if placeless and migration.used not in _CROSSING:
        why = next(iter(evidence.skipped.values()))
        yield f"no module of the adapter has a place in the new base ({why})"


def _hopeless(
    migration: Migration, evidence: Evidence, port: Forecast | None, similarity: float | None
) -> Iterable[str]:
    """Why nothing worth having would come over by the method at hand."""
    if port is None or similarity is None:
        return
    resized = evidence.resized
    if similarity < _RELATED and resized > 0.5:
        # Whatever is forecast from shapes: no unit of the one base answers to any of the other.
        yield (
            f"the new base has other sizes ({resized:.0%} of the update is in modules that changed shape), and no "
            "correspondence of its hidden units to the old one's was found in the weights"
        )
        return
    # Between unrelated weights, a forecast of nothing is no small sample's: however wide, its interval does not help.
    nothing = similarity < _RELATED and port.recovery < _NOTHING
    if port.high >= FLOOR and not nothing:
        return
    top = f"at best {max(0.0, port.high):.0%} of a native adapter's gain would come over"
    if similarity < _RELATED:
        what = ": the file would load without an error and do nothing, or harm"
        if resized > 0:
            what = f", and {resized:.0%} of the update is in modules of another size"
        # Adding 0.0 keeps a small negative figure from showing as -0.00.
        figure = f"similarity {round(similarity, 2) + 0.0:.2f}; 1 equal, 0 unrelated"
        yield f"the weights have nothing to do with each other ({figure}){what}"
    else:
        yield f"the new base is too far away where the adapter works: {top} (the floor is {FLOOR:.0%})"


def _reasons(
    migration: Migration, evidence: Evidence, port: Forecast | None, similarity: float | None, distance: float | None
) -> Iterable[str]:
    if similarity is not None and distance is not None:
        yield f"weights under the adapter drifted by {distance:.1%} (similarity {similarity:.2f})"
    if port is not None:
        yield basis(port)
    if migration.used != "copy" and migration.method == "auto":
        yield migration.reason
    contained = evidence.contained()
    if contained is not None and contained > 0.2:
        yield f"about {contained:.0%} of the update is already in the new base: it may come out too strong"
    if evidence.removed > 0:
        yield (
            f"{len(evidence.skipped)} modules with {evidence.removed:.1%} of the update have no place in the new base"
        )
    drifted = {ref for ref, n in evidence.nearness.items() if (n.distance or 0.0) > _DRIFTED}
    share = sum(evidence.shares.get(ref, 0.0) for ref in drifted)
    if share >= 0.01 and migration.used == "copy":
        yield f"{share:.0%} of the update is in modules that drifted by more than {_DRIFTED:.0%}"


def basis(forecast: Forecast) -> str:
    """What a forecast was read from, and what it rests on."""
    read = {
        "headers": "names and shapes alone",
        "weights": "the weights, no model run",
        "activations": "both models run on self-made inputs",
    }[forecast.basis]
    return (
        f"forecast from {read}: {forecast.recovery:.0%} of a native adapter's gain, {forecast.low:.0%} to "
        f"{forecast.high:.0%}; it rests on {forecast.adapters} adapters on {forecast.pairs} pairs of bases"
    )


def _advice(forecasts: Forecasts, *, crossing: bool) -> str:
    """Which tier would work where the method at hand would not; ``crossing``: whether `stream` may be tried."""
    for name, what in _OTHER_WAYS.items():
        found: Forecast | None = getattr(forecasts, name)
        if found is not None and found.recovery >= FLOOR:
            return f"{what}: {found.recovery:.0%} expected ({found.low:.0%} to {found.high:.0%})"
    if crossing:
        return f"{_OTHER_WAYS['stream']}, which carries a part; more takes a refine, or a bridge beside the old base"
    return "a refine, or a bridge beside the old base, is what remains"


def _by_itself(refusal: str) -> bool:
    """Whether a refusal says itself what to do."""
    return any(what in refusal for what in ("port the original", "already contains", "looks untrained"))


def other_family(old: BaseSummary, new: BaseSummary) -> bool:
    """Whether two bases are known to be of families that name their modules otherwise."""
    # Families of one naming (Llama, Mistral) can't always be told apart; their weights can, below.
    return old.family is not None and new.family is not None and not same_naming(old.family, new.family)
