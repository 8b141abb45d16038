"""A model card: what an adapter came from, what was carried, and what was measured of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from regraft.adapter import Adapter
from regraft.errors import InputError, printable
from regraft.forecast.verdict import basis
from regraft.lineage import lineage_of
from regraft.lineage.model import BaseId, Fidelity, Lineage, Port
from regraft.lineage.name_sets import count
from regraft.migrations.base_id import public_name
from regraft.report.depth import CONTROLS, effects, forecasts_of, number, significant, whole_percent
from regraft.report.schema import CheckReport, Interval, VerifyReport

# As the hub names repositories.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card(
    adapter: Adapter,
    title: str,
    *,
    license: str | None = None,
    pictures: Sequence[str] = (),
    report: str | None = None,
    forecast: CheckReport | None = None,
    measured: VerifyReport | None = None,
) -> str:
    """README.md for a repository of the hub, from what the file says of itself, and what is given beside it.

    Args:
        adapter: read.
        title: its name.
        license: as the hub calls it.
        pictures: names of files beside it.
        report: likewise, of a page of regraft's.
        forecast: of ``check --json``.
        measured: of ``verify --json``.

    Raises:
        InputError: its lineage is damaged, or the forecast is for bases of other shapes.
    """
    document = lineage_of(adapter)
    lineage = None if document is None else Lineage.model_validate(document)
    if forecast is not None and lineage is not None and lineage.base.structure is not None:
        ends = [base.structure for base in (forecast.source, forecast.target) if base is not None]
        if lineage.base.structure not in ends:
            what = "the forecast is for bases of other shapes than this adapter's"
            raise InputError(what, remedy="`regraft check ADAPTER --from OLD --to NEW --json` makes one.")
    parts = [_front(adapter, lineage, license), f"# {_plain(title)}", _what(adapter, lineage)]
    parts += [f"![{_plain(name)}]({quote(name)})" for name in pictures]
    parts += [f"[The report]({quote(report)}) has every module and figure."] if report is not None else []
    ports = lineage.ports if lineage is not None else []
    if ports:
        parts += ["## Where it comes from", *(_port(port) for port in ports)]
    else:
        parts.append("Its file does not say that it was carried over from another base.")
    parts += ["## What was expected", _expected(forecast)] if forecast is not None else []
    figures = [figure for port in ports for figure in port.fidelity]
    if ports or measured is not None:
        parts.append("## What was measured")
        parts += [_beside(measured)] if measured is not None else []
        parts += [_stamped(figures)] if figures or measured is None else []
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


def _expected(report: CheckReport) -> str:
    """The forecast of each tier with its interval, and what it rests on."""
    source = "" if report.source is None else f"from **{_public(report.source.path)}** "
    head = f"Of a port {source}to **{_public(report.target.path)}** by `{_plain(report.method)}`: *{report.verdict}*."
    found = forecasts_of(report)
    if not found:
        return f"{head} Too little was measured on such pairs for a figure."
    lines = ["| way | share of a native adapter's gain | interval |", "|---|---:|---|"]
    for name, value in found:
        lines.append(
            f"| {name} | {whole_percent(value.recovery)} | {whole_percent(value.low)} to {whole_percent(value.high)} |"
        )
    port = report.forecast.port
    rests = f"\n\nA {basis(port)}." if port is not None else ""
    return f"{head}\n\n" + "\n".join(lines) + rests


def _beside(report: VerifyReport) -> str:
    """The port's effect beside the controls'."""
    rows = effects(report)
    with_kl = any(effect.kl for effect in rows.values())
    lines = [f"| | effect cosine | norm ratio |{' KL |' if with_kl else ''}", f"|---|---:|---:|{'---:|' * with_kl}"]
    for name, effect in rows.items():
        cells = [_interval(effect.effect_cosine), _interval(effect.effect_norm_ratio)]
        cells += [_interval(effect.kl, significant)] if with_kl else []
        lines.append(f"| {_plain(CONTROLS.get(name, name))} | {' | '.join(cells)} |")
    return (
        f"The effect on **{_public(report.target)}** beside that of the original on **{_public(report.source)}**, over "
        f"{report.n_inputs} inputs ({_plain(report.inputs)}):\n\n" + "\n".join(lines) + "\n\nCosine 1: the same "
        "direction; ratio 1: as strong. 95 % intervals over inputs."
    )


def _interval(value: Interval | None, digits: Callable[[float | None], str] = number) -> str:
    if value is None or value.mean is None:
        return "–"
    ends = "" if value.low is None or value.high is None else f" ({digits(value.low)} to {digits(value.high)})"
    return digits(value.mean) + ends


def _public(path: str) -> str:
    """A base as it may be told to strangers: no folder of somebody's disk."""
    is_id = _HUB_ID.fullmatch(path) and not Path(path).exists()
    return _plain(path if is_id else public_name(path))


def _stamped(figures: Sequence[Fidelity]) -> str:
    """What the file's lineage says that was measured."""
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
