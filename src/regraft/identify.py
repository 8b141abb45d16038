"""Which base was an adapter made for? What it says of its base, held against the bases at hand.

What adapters say (facts): sd-scripts and tools after it store ``ss_sd_model_hash`` (the legacy hash) and
``ss_new_sd_model_hash`` (SHA-256) of a single-file base, ``NOFILE`` or ``IsADirectory`` in their place otherwise, and
``ss_sd_model_name``; some tools put AutoV2 or AutoV3 there, known by their length (see `regraft.filehash`). PEFT's
config has ``base_model_name_or_path`` and ``revision``. A lineage has the fingerprint itself. An adapter's own
``modelspec.hash_sha256`` and ``sshs_model_hash`` are of its own tensors and say nothing of a base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from regraft._version import __version__
from regraft.adapter import Adapter
from regraft.base import Base, open_base
from regraft.errors import InputError, RegraftError, UsageError
from regraft.families import family_of_base
from regraft.filehash import EMPTY_LEGACY, LEGACY_SPAN, FileHashes, file_hashes, legacy_digits, legacy_hash
from regraft.fingerprint import Fingerprint, parse_brief
from regraft.hub import hub_id_of
from regraft.likeness import compare_sketches
from regraft.lineage import KEY as LINEAGE
from regraft.plan import count_fits, locate
from regraft.report.identify_schema import CandidateSummary, ClueSummary, IdentifyReport, Match
from regraft.tensor_files import WEIGHTS_SUFFIXES

if TYPE_CHECKING:
    from regraft.hub.repository import PublishedFile

_HASH_KEYS = ("ss_new_sd_model_hash", "ss_sd_model_hash")
_NAME_KEYS = ("ss_sd_model_name",)
_HEX = re.compile(r"(?:0x)?([0-9a-f]{8,64})", re.IGNORECASE)
_LEGACY, _AUTO_V3, _SHA256 = 8, 12, 64
_RANK: dict[Match, int] = {"exact": 0, "same": 1, "likely": 2, "possible": 3, "other": 4, "unfit": 5}

#: Called with (candidates done, candidates in all, the candidate's name).
Ticker = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Clue:
    """One thing that an adapter says of its base.

    Attributes:
        source: where it stands.
        kind: what it is.
        value: as it is compared: a fingerprint, ``component hash`` pairs, a brief sketch, hexadecimal digits, a name.
        revision: of a name, where it is told.
    """

    source: str
    kind: Literal["fingerprint", "components", "sketch", "hash", "name"]
    value: str
    revision: str | None = None


def clues_of(adapter: Adapter) -> list[Clue]:
    """What the adapter says of its base, the strongest first.

    A ported adapter's lineage overrides what its trainer wrote: that was of the first base.
    """
    found = list(_from_lineage(adapter))
    if any(clue.kind in ("fingerprint", "components", "sketch") for clue in found):
        return found
    for key in _HASH_KEYS:
        match = _HEX.fullmatch(adapter.metadata.get(key, "").strip())
        if match and match[1].lower() != EMPTY_LEGACY:
            found.append(Clue(key, "hash", match[1].lower()))
    for key in _NAME_KEYS:
        name = adapter.metadata.get(key, "").strip()
        if name and name != "None":
            found.append(Clue(key, "name", name))
    config = adapter.config or {}
    path, revision = config.get("base_model_name_or_path"), config.get("revision")
    if isinstance(path, str) and path:
        found.append(Clue("base_model_name_or_path", "name", path, revision if isinstance(revision, str) else None))
    return found


def _from_lineage(adapter: Adapter) -> Iterable[Clue]:
    """The base that the lineage names last; a damaged lineage says nothing (`regraft lineage validate` tells)."""
    try:
        lineage = json.loads(adapter.metadata.get(LINEAGE, "null"))
        base: Any = lineage.get("base") or lineage["ports"][-1]["to"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return
    parts: Mapping[str, Any] = base if isinstance(base, dict) else {"fingerprint": base}
    kinds: tuple[Literal["fingerprint", "sketch", "name"], ...] = ("fingerprint", "sketch", "name")
    for kind in kinds:
        if isinstance(parts.get(kind), str) and parts[kind]:
            yield Clue(f"lineage: {kind}", kind, parts[kind])
    samples = parts.get("components")
    if isinstance(samples, dict):
        # Of the others, an adapter says nothing: a LoRA of the U-Net alone fits every base with that U-Net.
        touched = {name: text for name, text in samples.items() if name in adapter.components()} or samples
        yield Clue("lineage: components", "components", " ".join(f"{name} {text}" for name, text in touched.items()))


def identify_base(adapter: Adapter, candidates: Sequence[str | Path], *, tick: Ticker | None = None) -> IdentifyReport:
    """Find the adapter's base among candidates, by hashes and fingerprints, names, and whether it fits.

    Args:
        adapter: as it was read.
        candidates: bases (files, folders or hub ids), or folders of such.
        tick: called before each candidate is looked at.

    Raises:
        UsageError: no candidate is given.
        InputError: a candidate does not exist.
    """
    clues = clues_of(adapter)
    paths = expand(candidates)
    found = []
    for done, path in enumerate(paths):
        if tick is not None:
            tick(done, len(paths), path.name)
        found.append(_judge(adapter, clues, path))
    found.sort(key=lambda candidate: _RANK[candidate.match])
    best, summary = _answer(adapter, clues, found)
    told = [ClueSummary(source=clue.source, kind=clue.kind, value=clue.value) for clue in clues]
    return IdentifyReport(
        regraft_version=__version__,
        file=str(adapter.path),
        family=adapter.family,
        clues=told,
        candidates=found,
        found=best,
        summary=summary,
    )


def expand(candidates: Sequence[str | Path]) -> list[Path]:
    """Every base that the candidates name; a folder that is no base stands for those directly in it.

    Raises:
        UsageError: no candidate is given.
        InputError: a candidate does not exist, or a folder holds nothing that could be a base.
    """
    if not candidates:
        raise UsageError("no base is given to look among", remedy="Give files, folders, or a folder of such.")
    found: dict[Path, None] = {}
    for given in candidates:
        path = Path(given).expanduser()
        if hub_id_of(path) is not None:
            found[path] = None
            continue
        if not path.exists():
            raise InputError("no such file or folder", file=path, remedy="Check the path of the base.")
        if not path.is_dir():
            found[path] = None
            continue
        inside = [path] if _is_base(path) else [child for child in sorted(path.iterdir()) if _may_be_base(child)]
        if not inside:
            raise InputError("holds no base", file=path, remedy="Give weights files, or model folders.")
        found.update(dict.fromkeys(inside))
    return list(found)


def _is_base(folder: Path) -> bool:
    try:
        open_base(folder)
    except RegraftError:
        return False
    return True


def _may_be_base(path: Path) -> bool:
    return path.suffix.lower() in WEIGHTS_SUFFIXES if path.is_file() else path.is_dir() and _is_base(path)


def _judge(adapter: Adapter, clues: Sequence[Clue], path: Path) -> CandidateSummary:
    """How well one candidate matches, and why."""
    try:
        base = open_base(path, whole=False)
    except RegraftError as error:
        return CandidateSummary(path=str(path), family=None, match="unfit", evidence=[f"can't be read: {error.what}"])
    family, evidence = family_of_base(base), list[str]()
    fits, all_ = _fit(adapter, base)
    if 2 * fits < all_:
        told = [f"{fits} of {all_} modules of the adapter fit it"]
        return CandidateSummary(path=str(path), family=family, match="unfit", evidence=told)
    found = [_CHECKS[clue.kind](clue, base, evidence) for clue in clues if clue.kind in _CHECKS]
    found.append(_by_hashes([clue for clue in clues if clue.kind == "hash"], base, evidence))
    matches = [match for match in found if match is not None]
    evidence.append(f"{fits} of {all_} modules of the adapter fit it")
    best = min(matches, key=_RANK.__getitem__, default="possible")
    # A name may lie (a newer file under an old name); a hash that differs does not.
    if best == "likely" and "other" in matches:
        best = "other"
    return CandidateSummary(path=str(path), family=family, match=best, evidence=evidence)


def _fit(adapter: Adapter, base: Base) -> tuple[int, int]:
    """Modules of the adapter that have a weight of their shape in the base, and all of them."""
    located = locate(adapter, base, "old")
    all_ = len(located.modules) + len(located.vectors) + len(located.unknown) + len(located.missing)
    return count_fits(adapter, base, located), all_


def _by_fingerprint(clue: Clue, base: Base, evidence: list[str]) -> Match | None:
    if not clue.value.startswith("v1:"):
        return None
    equal = clue.value == base.fingerprint
    evidence.append(f"{clue.source} {'is' if equal else 'is not'} its fingerprint")
    return "exact" if equal else "other"


def _by_components(clue: Clue, base: Base, evidence: list[str]) -> Match | None:
    words = clue.value.split()
    wanted = dict(zip(words[::2], words[1::2], strict=False))
    own = {name: part.sample for name, part in base.prints.components.items()}
    # A model alone has no component name.
    alone = "model" in (*wanted, *own)
    if not wanted or not all(
        own.get(name) == text or (alone and text in own.values()) for name, text in wanted.items()
    ):
        return None
    evidence.append(f"{clue.source} are its own ({', '.join(wanted)})")
    return "exact"


def _by_sketch(clue: Clue, base: Base, evidence: list[str]) -> Match | None:
    try:
        component, sketch = parse_brief(clue.value)
    except ValueError:
        return None
    whole: Fingerprint = base.prints
    part = whole.components.get(component) or whole.components.get("model")
    if part is None or part.sketch is None:
        return None
    likeness = compare_sketches(sketch, part.sketch)
    evidence.append(f"{clue.source}: {likeness}")
    return "same" if likeness.verdict == "same" else "other"


class _Hashed(Protocol):
    """A weights file, by the hashes that a clue may be."""

    @property
    def name(self) -> str: ...
    def legacy(self) -> str: ...
    def whole(self) -> FileHashes: ...


@dataclass(frozen=True)
class _LocalFile:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def legacy(self) -> str:
        return legacy_hash(self.path)

    def whole(self) -> FileHashes:
        return file_hashes(self.path)


@dataclass(frozen=True)
class _FileOnHub:
    published: PublishedFile

    @property
    def name(self) -> str:
        return self.published.name

    def legacy(self) -> str:
        file, (start, size) = self.published.file, LEGACY_SPAN
        start = min(start, file.size)
        return legacy_digits(file.read([(start, min(size, file.size - start))])[0])

    def whole(self) -> FileHashes:
        return FileHashes(self.published.sha256 or "", None)


def _by_hashes(clues: Sequence[Clue], base: Base, evidence: list[str]) -> Match | None:
    """All hashes at once: the legacy one, which is read in no time, spares the others most of the files."""
    files = _weights_files(base) if clues else []
    if not files:
        return None
    legacy = [clue for clue in clues if len(clue.value) == _LEGACY]
    for file in files:
        if legacy and file.legacy() not in [clue.value for clue in legacy]:
            continue
        longer = [clue for clue in clues if len(clue.value) > _LEGACY]
        if not longer:
            evidence.append(f"{legacy[0].source} is the legacy hash of {file.name}, which others may share")
            return "likely"
        for clue in longer:
            if _has_hash(file, clue.value):
                evidence.append(f"{clue.source} is the hash of {file.name}")
                return "exact"
    evidence.append(f"{clues[0].source} is the hash of another file")
    return "other"


def _has_hash(file: _Hashed, value: str) -> bool:
    hashes = file.whole()
    of_data = len(value) in (_AUTO_V3, _SHA256) and (hashes.data or "").startswith(value)
    return hashes.sha256.startswith(value) or of_data


def _weights_files(base: Base) -> Sequence[_Hashed]:
    hub_id = hub_id_of(base.path)
    if hub_id is not None:
        from regraft.hub.repository import published_files

        return [_FileOnHub(file) for file in published_files(hub_id)]
    inside = [base.path] if base.path.is_file() else sorted(base.path.glob("*"))
    return [_LocalFile(file) for file in inside if file.is_file() and file.suffix.lower() in WEIGHTS_SUFFIXES]


def _by_name(clue: Clue, base: Base, evidence: list[str]) -> Match | None:
    from regraft.port import base_name

    name, revision = base_name(str(base.path))
    hub_id = hub_id_of(base.path)
    if hub_id is not None:
        name, revision = hub_id.repo, hub_id.revision
    own = {name, base.path.name, base.path.stem} | {
        str(config["_name_or_path"]) for config in base.configs.values() if config.get("_name_or_path")
    }
    wanted = {clue.value, Path(clue.value.replace("\\", "/")).name}
    if not own & wanted:
        return None
    if clue.revision is not None and revision is not None and clue.revision != revision:
        evidence.append(f"{clue.source} names it, but at revision {clue.revision[:12]}")
        return None
    evidence.append(f"{clue.source} names it")
    return "likely"


_CHECKS: dict[str, Callable[[Clue, Base, list[str]], Match | None]] = {
    "fingerprint": _by_fingerprint,
    "components": _by_components,
    "sketch": _by_sketch,
    "name": _by_name,
}


def _answer(adapter: Adapter, clues: Sequence[Clue], candidates: Sequence[CandidateSummary]) -> tuple[str | None, str]:
    """The base that was found, and a sentence."""
    best = candidates[0]
    equals = [candidate for candidate in candidates if candidate.match == best.match]
    if best.match in ("exact", "same"):
        how = "by hash" if best.match == "exact" else "the same weights, up to rounding"
        more = f" ({len(equals) - 1} more like it)" if len(equals) > 1 else ""
        return best.path, f"It was made for {best.path}: {how}{more}."
    if best.match == "likely" and len(equals) == 1:
        return best.path, f"It was probably made for {best.path}, by its name alone."
    if best.match in ("likely", "possible"):
        which = "more than one has its name" if best.match == "likely" else "it names no base that is among these"
        if not clues:
            which = "it says nothing of its base"
        return None, f"Not known: {which}; {len(equals)} of {len(candidates)} fit."
    if best.match == "other":
        said = next((clue.value for clue in clues if clue.kind == "name"), "another file")
        return None, f"Not among these: it was made for {said}. A file with the same weights may fit all the same."
    return None, f"None of these fits an adapter for {adapter.family or 'an unknown family'}."
