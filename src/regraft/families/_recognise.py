"""The family of an adapter by its names in any scheme, its shapes, and what its metadata says.

Shapes decide where they tell families apart; metadata where they don't; else the common family is the answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from regraft.adapter import MODEL
from regraft.families._family import Family, families
from regraft.families._gguf import gguf_families, gguf_names
from regraft.families._tables import CANONICAL, Named, Table, table
from regraft.families._templates import kind_of
from regraft.tensors import Shape

#: Component (or "" where it isn't known) → module or parameter → shape of its change; None where that isn't known.
Names = Mapping[str, Mapping[str, "Shape | None"]]

# Share of an adapter's modules that must be in a family's table; the rest may be extras such as a new input layer.
ENOUGH = 0.9
#: llama.cpp's names of language models; see `gguf_names`.
GGUF = "gguf"
_GGUF_BEGINNINGS = ("blk.", "enc.blk.", "dec.blk.", "token_embd", "output", "position_embd", "token_types")
_MAIN = ("unet", "transformer", "prior", MODEL)


@dataclass(frozen=True)
class Match:
    """How the names of one component of an adapter are to be read.

    Attributes:
        component: of the family.
        scheme: ``canonical``, ``original``, one of the family's spellings, or ``gguf`` (see `gguf_names`).
        flat: whether the names are flattened (``_`` for ``.``).
        coverage: share of the given names that the scheme has.
        table: whose names they are; None for families that are told by patterns.
    """

    component: str
    scheme: str
    flat: bool
    coverage: float
    table: str | None = None

    @property
    def named(self) -> Mapping[str, Named]:
        """Name in the file → dotted name and canonical pieces; empty for families that are told by patterns."""
        return table(self.table).named(self.scheme, flat=self.flat) if self.table else {}


@dataclass(frozen=True)
class Recognition:
    """The answer of `recognise`.

    Attributes:
        family: its name.
        matches: for each component that was given, how its names are read; components of which no name is known are
            left out.
        coverage: share of all given names that are known.
        exact: whether shapes agree with the family's tables; otherwise only the names do (a model of other widths).
    """

    family: str
    matches: Mapping[str, Match]
    coverage: float
    exact: bool


def recognise(
    names: Names,
    metadata: Mapping[str, str] | None = None,
    *,
    schemes: Iterable[str] | None = None,
    minimum: float = 0.5,
) -> Recognition | None:
    """The family, components and naming scheme of an adapter's names, or None.

    Args:
        names: component → name → shape of ΔW, (out, in) or (out, in, kh, kw), or of the whole parameter. The component
            is what the file says: a family's own (``text_encoder_2``), ``unet`` or ``transformer`` for the main model
            whatever it is, or ``""`` (or ``model``) where the file does not say. A name is a module or a whole
            parameter, in diffusers' or transformers' names, the original code's, or another tool's spelling;
            flattened names (kohya's ``double_blocks_0_img_attn_qkv``) are modules. All names of a component are of
            one scheme.
        metadata: what a file says of its base: ``ss_base_model_version``, ``modelspec.architecture``,
            ``general.architecture``; under ``config`` a class, path or hub id. It tells families of the same names
            and shapes apart, and never overrules shapes.
        schemes: only these; all by default.
        minimum: least share of the names that must be known.

    Returns:
        The family of the highest coverage among those whose shapes agree. If shapes agree nowhere: by names alone.
    """
    total = sum(len(paths) for paths in names.values())
    if not total:
        return None
    wanted = frozenset(schemes) if schemes is not None else None
    ranked: list[tuple[tuple[bool, int, int], Family, dict[str, Match]]] = []
    for family, matches, known, same in _candidates(names, metadata or {}, wanted):
        if known >= minimum * total:
            ranked.append(((same == known and known >= ENOUGH * total, known, same), family, matches))
    if not ranked:
        return _by_patterns(names, metadata or {})
    best = max(rank for rank, _, _ in ranked)
    drawn = [(family, matches) for rank, family, matches in ranked if rank == best]
    family, matches = drawn[0] if len(drawn) == 1 else _of_a_draw(drawn, names, metadata or {})
    _, known, same = best
    return Recognition(_named(family, same == known), matches, known / total, same == known)


def _of_a_draw(
    drawn: list[tuple[Family, dict[str, Match]]], names: Names, metadata: Mapping[str, str]
) -> tuple[Family, dict[str, Match]]:
    """Of families that hold all the names alike: the one of which the file has all modules of its kinds.

    SSD-1B's modules are some of SDXL's: a file that has all of them and none besides is for SSD-1B.
    """
    whole: dict[str | None, bool] = {}
    for family, matches in drawn:
        main = family.components[family.main]
        for key, match in matches.items():
            if match.table == main and main not in whole:
                whole[main] = _is_whole(match, names[key])

    def rank(one: tuple[Family, dict[str, Match]]) -> tuple[bool, bool, int, int]:
        family = one[0]
        whole_ = whole.get(family.components[family.main], False)
        # A descendant is here only because the metadata names it.
        return whole_, family.descends is not None, _hinted(family, metadata), -family.priority

    return max(drawn, key=rank)


def _is_whole(match: Match, names: Mapping[str, Shape | None]) -> bool:
    kinds = {kind_of(name) for name in names}
    return all(name in names for name in match.named if kind_of(name) in kinds)


def _named(family: Family, exact: bool) -> str:
    other: str | None = family.data.get("other_widths")
    return family.name if exact or other is None else other


def _candidates(
    names: Names, metadata: Mapping[str, str], schemes: frozenset[str] | None
) -> Iterator[tuple[Family, dict[str, Match], int, int]]:
    kinds = {key: Counter(kind_of(name) for name in paths) for key, paths in names.items()}
    counted: dict[tuple[str, str], tuple[Match, int, int]] = {}
    for family in families().values():
        hinted = _hinted(family, metadata)
        if not family.components or (family.descends and not hinted):
            continue
        matches: dict[str, Match] = {}
        known = alike = 0
        for key, paths in names.items():
            found: list[tuple[Match, int, int]] = []
            for component in _components(family, key):
                one = family.table(component)
                if (key, one.name) not in counted:
                    schemes_of = [scheme for scheme in one.schemes if schemes is None or scheme in schemes]
                    # A look at the kinds of names spares most tables from being expanded.
                    likely = [scheme for scheme in schemes_of if _share(kinds[key], one.kinds(scheme)) >= 0.5]
                    counted[key, one.name] = _count(one, component, paths, likely, family.varying)
                match, hits, same = counted[key, one.name]
                found.append((Match(component, match.scheme, match.flat, match.coverage, match.table), hits, same))
            if found:
                match, hits, same = max(found, key=lambda entry: (entry[1], entry[2]))
                if hits:
                    matches[key], known, alike = match, known + hits, alike + same
        # A text encoder alone is of no family of pipelines, unless the file says of which.
        if matches and (hinted or any(match.component == family.main for match in matches.values())):
            yield family, matches, known, alike


def _share(kinds: Counter[str], known: frozenset[str]) -> float:
    return sum(count for kind, count in kinds.items() if kind in known) / max(1, kinds.total())


def _components(family: Family, key: str) -> list[str]:
    if key in family.components:
        return [key]
    if key in ("", MODEL):
        return list(family.components)
    if key in _MAIN:
        return [family.main] if family.main in family.components else []
    if len(family.components) == 1 and family.main.startswith("text_encoder"):
        # Pipelines number their encoders differently: CLIP ViT-L is the second one of HunyuanVideo.
        return [family.main]
    return [component for component in family.components if component != family.main]


def _count(
    one: Table,
    component: str,
    paths: Mapping[str, Shape | None],
    schemes: list[str],
    varying: tuple[str, ...],
) -> tuple[Match, int, int]:
    best = Match(component, CANONICAL, False, 0.0, one.name), 0, 0
    # A flattened name has no dot; a dotted one may have none either (``x_embedder``).
    for flat in (False, True) if all("." not in name for name in paths) else (False,):
        for scheme in schemes:
            named = one.named(scheme, flat=flat)
            common = paths.keys() & named.keys()
            if len(common) <= best[1]:
                continue
            same = sum(_agrees(named[name], paths[name], varying) for name in common)
            best = Match(component, scheme, flat, len(common) / len(paths), one.name), len(common), same
    return best


def _agrees(entry: Named, shape: Shape | None, varying: tuple[str, ...]) -> bool:
    if shape is None or alike(entry.shape, shape):
        return True
    return any(piece.name.removesuffix(".weight") in varying for piece in entry.pieces)


def alike(one: Shape, two: Shape) -> bool:
    """Whether two shapes are of one matrix: a 1 × 1 convolution and a linear layer hold the same update."""
    return one[:2] == two[:2] and prod(one) == prod(two)


def _hinted(family: Family, metadata: Mapping[str, str]) -> int:
    """How many of the family's hints the metadata holds."""
    hints: Mapping[str, str] = family.data.get("hints", {})
    if not hints and "hint" in family.rules:
        hints = {"config": family.rules["hint"]}
    return sum(
        bool(re.search(pattern, metadata[key], re.IGNORECASE)) for key, pattern in hints.items() if key in metadata
    )


def main_of(components: Mapping[str, Any]) -> str | None:
    """The component that tells the family: the denoiser, or the only model."""
    return next((name for name in (*_MAIN, *components) if components.get(name)), None)


def fits_names(rules: Mapping[str, Any], names: list[str], *, every: bool) -> bool:
    """Whether names are as the patterns of a family's file say."""
    if every and not all(re.search(rules["every"], name) for name in names):
        return False
    some = rules.get("some", [])
    absent = rules.get("absent", [])
    return all(any(re.search(pattern, name) for name in names) for pattern in some) and not any(
        re.search(pattern, name) for pattern in absent for name in names
    )


def _by_patterns(names: Names, metadata: Mapping[str, str]) -> Recognition | None:
    main = main_of(names)
    if main is None:
        return None
    paths = [name.removesuffix(".weight").removesuffix(".bias") for name in names[main]]
    share = len(paths) / sum(len(others) for others in names.values())
    if all(path.startswith(_GGUF_BEGINNINGS) for path in paths):
        known = [name for name in gguf_families() if all(gguf_names(name).canonical(path) for path in paths)]
        said = [name for name in gguf_families(metadata.get("general.architecture")) if name in known]
        if known:
            spoken = max(said or known, key=lambda name: _hinted(families()[name], metadata))
            return Recognition(spoken, {main: Match(families()[spoken].main, GGUF, False, 1.0)}, share, False)
    for family in families().values():
        if "adapter" in family.rules and fits_names(family.rules["adapter"], paths, every=True):
            others = [one for one in families().values() if one.naming == family.naming and not one.components]
            chosen = max([family, *others], key=lambda one: (_hinted(one, metadata), one is family))
            return Recognition(chosen.name, {main: Match(chosen.main, CANONICAL, False, 1.0)}, share, False)
    return None


def family_of_modules(modules: Mapping[str, Mapping[str, Shape]]) -> str | None:
    """The family that an adapter's modules belong to, or None.

    Families that list their modules are told by names and shapes; the others by names alone, so that the answer is
    the common one of families with the same naming (``llama`` for Mistral and Qwen2 too; see `same_naming`).

    Args:
        modules: component → module path → shape of ΔW: (out, in) or (out, in, kh, kw).
    """
    found = recognise(modules, schemes=(CANONICAL,), minimum=ENOUGH)
    return found.family if found is not None else None
