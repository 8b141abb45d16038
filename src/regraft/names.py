"""Module names that differ by a prefix: ``bert.encoder…`` in one file is ``encoder…`` in another."""

from __future__ import annotations

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
    plain = {name: _plain(name) for name in names}
    strips = {p for name in plain.values() for p, rest in _splits(name) if rest in places}
    values = set(plain.values())
    adds = {p for place in places for p, rest in _splits(place) if rest in values}
    ranked: list[tuple[int, int, dict[str, str | None]]] = []
    for strip, add in [("", ""), *((p, "") for p in sorted(strips)), *(("", p) for p in sorted(adds))]:
        moved = {name: places.get(_moved(text, strip, add)) for name, text in plain.items()}
        hits = sum(target is not None for target in moved.values())
        length = (strip + add).count(".")
        ranked.append((-hits, length, moved))
    ranked.sort(key=lambda entry: entry[:2])
    best = ranked[0]
    drawn = [moved for hits, length, moved in ranked if (hits, length) == best[:2]]
    return {name: best[2][name] if all(other[name] == best[2][name] for other in drawn) else None for name in names}


def _moved(text: str, strip: str, add: str) -> str:
    if strip:
        return text.removeprefix(strip) if text.startswith(strip) else ""
    return add + text


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
