"""The verdict: will this adapter survive on the new base? From drift and similarity of the weights that it touches.

The limits below are rules of thumb, set on identities (equal, permuted, random and merged bases), not fitted to
measured recoveries; `regraft verify` measures. No figure of expected recovery is given until there is one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from regraft.adapter import Adapter
from regraft.families import same_naming
from regraft.forecast.evidence import Evidence
from regraft.lineage import ports_of
from regraft.lineage.fit import other_base
from regraft.migration import Migration
from regraft.report.schema import BaseSummary, Verdict

# Below this similarity, old and new weights have no more to do with each other than by chance or a distant start.
_RELATED = 0.5
# Up to this drift, and from this similarity on, a plain copy kept most of an adapter wherever it was tried.
_NEAR_DISTANCE, _NEAR_SIMILARITY = 0.25, 0.9
# From this share on, the drift from old to new is (or holds) the adapter itself.
_CONTAINED = 0.5
# A share this many standard deviations above chance is no accident.
_CHANCE = 4.0
# Layers work one upon the other: a share of this size in drifted modules is felt, whatever the mean says.
_DRIFTED = 0.1
# A port that leaves more than this share of the update behind needs a refine to make up for it.
_SKIPPED = 0.1


@dataclass(frozen=True)
class Judgement:
    """A verdict with its reasons.

    Attributes:
        verdict: ``survives``, ``refine`` or ``refused``.
        summary: in a sentence.
        reasons: each in a sentence, the weightiest first.
        similarity: mean over modules, weighted by their share of ‖ΔW‖²; None where no weights were compared.
        distance: likewise, the relative drift.
    """

    verdict: Verdict
    summary: str
    reasons: tuple[str, ...] = ()
    similarity: float | None = None
    distance: float | None = None


def judge(adapter: Adapter, migration: Migration, evidence: Evidence) -> Judgement:
    """The verdict for one adapter on one migration.

    Args:
        adapter: as it was read, so that its lineage counts.
        migration: fitted for it, or read from a file.
        evidence: by the adapter's own module names.
    """
    near = evidence.nearness
    similarity = evidence.mean({ref: n.similarity for ref, n in near.items()}, missing=0.0)
    distance = evidence.mean({ref: n.distance for ref, n in near.items()})
    contained = evidence.contained()
    skipped = sum(evidence.shares.get(ref, 0.0) for ref in evidence.skipped)

    resized = sum(evidence.shares.get(ref, 0.0) for ref, n in near.items() if n.distance is None)
    refusals = list(_refusals(adapter, migration, similarity, contained, resized))
    if evidence.shares and len(evidence.skipped) == len(evidence.shares):
        refusals.append(
            f"no module of the adapter has a place in the new base ({next(iter(evidence.skipped.values()))})"
        )
    if refusals:
        return Judgement("refused", f"Refused: {refusals[0]}.", tuple(refusals), similarity, distance)

    reasons = []
    if similarity is not None and distance is not None:
        reasons.append(f"weights under the adapter drifted by {distance:.1%} (similarity {similarity:.2f})")
    if migration.used != "copy" and migration.method == "auto":
        reasons.append(migration.reason)
    if contained is not None and contained > 0.2:
        reasons.append(f"about {contained:.0%} of the update is already in the new base: it may come out too strong")
    if skipped > 0:
        reasons.append(
            f"{len(evidence.skipped)} modules with {skipped:.1%} of the update have no place in the new base"
        )
    drifted = 0.0
    if migration.used == "copy":
        drifted = sum(evidence.shares.get(ref, 0.0) for ref, n in near.items() if (n.distance or 0.0) > _NEAR_DISTANCE)
    if drifted > 0:
        reasons.append(f"{drifted:.0%} of the update is in modules that drifted by more than {_NEAR_DISTANCE:.0%}")
    if similarity is None:
        summary = "Not judged: without the old base's weights nothing says how far the new one drifted."
        return Judgement("refine", summary, tuple(reasons))
    if similarity < _NEAR_SIMILARITY or drifted > _DRIFTED or skipped > _SKIPPED:
        summary = "Part of it should survive: carry it over, measure it with `verify`, and expect to refine it."
        return Judgement("refine", summary, tuple(reasons), similarity, distance)
    return Judgement(
        "survives",
        "It should survive: the new base is near where the adapter needs it.",
        tuple(reasons),
        similarity,
        distance,
    )


def _refusals(
    adapter: Adapter, migration: Migration, similarity: float | None, contained: float | None, resized: float
) -> Iterable[str]:
    ports = ports_of(adapter)
    if ports:
        yield (
            f"the adapter is itself a port (by {ports[-1].get('method', 'an unknown method')}); a port of a "
            "port loses twice: port the original"
        )
    old, new = migration.source, migration.target
    if old is not None and (told := other_base(adapter, old)) is not None:
        yield told
    if old is not None and _other_family(old, new):
        yield f"the old base is {old.family}, the new one {new.family}: another family"
    if similarity is not None and similarity < _RELATED and resized > 0.5:
        yield (
            f"the new base has other sizes ({resized:.0%} of the update is in modules that changed shape), and no "
            "correspondence of its hidden units to the old one's was found in the weights"
        )
    elif similarity is not None and similarity < _RELATED:
        what = ": the file would load without an error and do nothing, or harm"
        if resized > 0:
            what = f", and {resized:.0%} of the update is in modules of another size"
        # Adding 0.0 keeps a small negative figure from showing as -0.00.
        figure = f"similarity {round(similarity, 2) + 0.0:.2f}; 1 equal, 0 unrelated"
        yield f"the weights have nothing to do with each other ({figure}){what}"
    if contained is not None and contained > _CONTAINED:
        yield f"the new base already contains this adapter (about {contained:.0%} of it is merged into its weights)"


def _other_family(old: BaseSummary, new: BaseSummary) -> bool:
    # Families of one naming (Llama, Mistral) can't always be told apart; their weights can, below.
    return old.family is not None and new.family is not None and not same_naming(old.family, new.family)
