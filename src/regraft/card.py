"""A model card: what an adapter came from, what was carried, and what was measured of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from regraft.adapter import Adapter
from regraft.errors import printable
from regraft.lineage import lineage_of
from regraft.lineage.model import BaseId, Lineage, Port
from regraft.lineage.name_sets import count

# As the hub names repositories.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card(adapter: Adapter, title: str, *, license: str | None = None, pictures: Sequence[str] = ()) -> str:
    """README.md for a repository of the hub, from what the file says of itself.

    Args:
        adapter: read.
        title: its name.
        license: as the hub calls it.
        pictures: names of files beside it.

    Raises:
        InputError: its lineage is damaged.
    """
    document = lineage_of(adapter)
    lineage = None if document is None else Lineage.model_validate(document)
    parts = [_front(adapter, lineage, license), f"# {_plain(title)}", _what(adapter, lineage)]
    parts += [f"![{_plain(name)}]({quote(name)})" for name in pictures]
    if lineage is not None and lineage.ports:
        parts += ["## Where it comes from", *(_port(port) for port in lineage.ports), "## What was measured"]
        parts.append(_measured(lineage.ports))
    else:
        parts.append("Its file does not say that it was carried over from another base.")
    return "\n\n".join(parts) + "\n"


def _front(adapter: Adapter, lineage: Lineage | None, license: str | None) -> str:
    """What the hub reads; JSON is YAML."""
    base = _base_of(adapter, lineage)
    kinds = sorted({update.kind for update in adapter.updates.values()})
    facts: dict[str, object] = {
        "library_name": "peft" if adapter.format == "peft" else "diffusers",
        "tags": [*kinds, "regraft", *([adapter.family] if adapter.family else [])],
    }
    if base is not None and _HUB_ID.fullmatch(base):
        facts |= {"base_model": base, "base_model_relation": "adapter"}
    if license is not None:
        facts["license"] = license
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in facts.items()]
    return "\n".join(["---", *lines, "---"])


def _base_of(adapter: Adapter, lineage: Lineage | None) -> str | None:
    if lineage is not None and lineage.base.name is not None:
        return lineage.base.name
    named = (adapter.config or {}).get("base_model_name_or_path")
    # A path of somebody's disk says nothing to others.
    return named if isinstance(named, str) and _HUB_ID.fullmatch(named) else None


def _what(adapter: Adapter, lineage: Lineage | None) -> str:
    kinds = Counter(update.kind for update in adapter.updates.values())
    told = ", ".join(f"{kind} on {n} modules" for kind, n in kinds.most_common())
    base = _base_of(adapter, lineage)
    whose = f"for **{_plain(base)}**" if base else "for a base that it does not name"
    print_ = f" (fingerprint `{lineage.base.fingerprint}`)" if lineage is not None else ""
    return f"An adapter {whose}{print_}: {told}, in the format `{adapter.format}`."


def _port(port: Port) -> str:
    rows = [f"From {_named(port.source)} to {_named(port.target)} by `{_plain(port.method)}`."]
    carried = sum(_count(kept.modules) for kept in port.kept)
    if carried:
        rows.append(f"- {carried} modules were carried.")
    for lost in port.lost:
        share = "" if lost.share is None else f" ({lost.share:.1%} of the update)"
        rows.append(f"- {_count(lost.modules)} modules were {lost.status}{share}: {_plain(lost.reason)}.")
    if port.verdict is not None:
        rows.append(f"- Forecast beforehand: *{_plain(port.verdict)}*{', overridden' if port.forced else ''}.")
    if port.refined is not None:
        refined = port.refined
        rows.append(
            f"- Refined for {refined.steps} steps (`{_plain(refined.objective)}`, {refined.inputs} inputs): "
            f"{refined.recovered:.0%} of what was wanted, on inputs that were held out."
        )
    return "\n".join([rows[0], "", *rows[1:]]).strip()


def _measured(ports: Sequence[Port]) -> str:
    figures = [figure for port in ports for figure in port.fidelity]
    if not figures:
        return "Nothing: `regraft verify` measures, and `regraft lineage stamp --measured` writes it into the file."
    lines = ["| figure | value | interval | how |", "|---|---:|---|---|"]
    for figure in figures:
        value = "–" if figure.value is None else f"{figure.value:.3f}"
        between = "–" if figure.low is None or figure.high is None else f"{figure.low:.3f} to {figure.high:.3f}"
        lines.append(f"| {_plain(figure.measure)} | {value} | {between} | {_plain(figure.how)} |")
    return "\n".join(lines)


def _count(modules: Mapping[str, Sequence[str]]) -> int:
    return sum(count(patterns) for patterns in modules.values())


def _named(base: BaseId | None) -> str:
    if base is None:
        return "a base that was not needed"
    return f"**{_plain(base.name)}**" if base.name else f"`{base.fingerprint}`"


def _plain(text: str) -> str:
    """Text of a stranger's file as Markdown shows it: no markup, no HTML, no line of its own."""
    shown = " ".join(printable(text).split())
    shown = re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", shown)
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
