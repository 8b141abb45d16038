"""Module names that differ by a prefix: ``bert.encoder…`` in one file is ``encoder…`` in another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

# transformers 5 dropped this level of CLIP's text encoder; checkpoints and adapters made before have it.
_OPTIONAL_LEVEL = "text_model"


def resolve_names(wanted: Iterable[str], available: Collection[str]) -> dict[str, str | None]:
    """Find each wanted name among the available ones, up to one prefix that is common to all.

    An equal name wins. Otherwise the prefix that, stripped from the wanted names or added to them, finds the most
    of them is used for all; on a draw the shortest one, and none where two of one length would give
    different answers. The level ``text_model.`` may be there or not on either side. No available name is given twice.

    >>> resolve_names(["bert.pooler.dense", "bert.cls"], ["pooler.dense", "embeddings"])
    {'bert.pooler.dense': 'pooler.dense', 'bert.cls': None}
    """
    names = list(dict.fromkeys(wanted))
    known = set(available)
    found: dict[str, str | None] = {name: name if name in known else None for name in names}
    taken = {name for name in names if name in known}
    if len(taken) == len(names):
        return found
    places = _plain_index(known)
    for name, target in _best(names, places).items():
        if found[name] is None and target is not None and target not in taken:
            found[name] = target
            taken.add(target)
    return found


def _best(names: list[str], places: dict[str, str]) -> dict[str, str | None]:
    """Every name's place under the prefix that finds the most; in one pass, for a file may have 100,000 prefixes."""
    found: dict[str, list[tuple[tuple[str, str], str]]] = {}
    hits: Counter[tuple[str, str]] = Counter({("", ""): 0})
    plain = {name: _plain(name) for name in names}
    by_text: dict[str, list[str]] = {}
    for name, text in plain.items():
        by_text.setdefault(text, []).append(name)

    def note(name: str, change: tuple[str, str], target: str) -> None:
        found.setdefault(name, []).append((change, target))
        hits[change] += 1

    for name, text in plain.items():
        if text in places:
            note(name, ("", ""), places[text])
        for prefix, rest in _splits(text):
            if rest in places:
                note(name, (prefix, ""), places[rest])
    for place, target in places.items():
        for prefix, rest in _splits(place):
            for name in by_text.get(rest, ()):
                note(name, ("", prefix), target)

    def rank(change: tuple[str, str]) -> tuple[int, int]:
        return -hits[change], "".join(change).count(".")

    best = min(map(rank, hits))
    drawn = {change for change in hits if rank(change) == best}
    answers = {}
    for name in names:
        given = [target for change, target in found.get(name, ()) if change in drawn]
        answers[name] = given[0] if len(given) == len(drawn) and len(set(given)) == 1 else None
    return answers


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every (prefix with its dot, rest) whose prefix names no numbered block: layer 0 must never become layer 5."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if parts[i - 1].isdigit():
            return
        yield ".".join(parts[:i]) + ".", ".".join(parts[i:])


def _plain(name: str) -> str:
    parts = name.split(".")
    if _OPTIONAL_LEVEL in parts[:-1]:
        parts.remove(_OPTIONAL_LEVEL)
    return ".".join(parts)


def _plain_index(available: Iterable[str]) -> dict[str, str]:
    """Name without the optional level → name; left as they are where two would fall together."""
    index: dict[str, str] = {}
    for name in sorted(available, key=lambda n: (_plain(n) != n, n)):
        index.setdefault(_plain(name), name)
    return index
