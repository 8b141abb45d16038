"""One picture of what became of each module along depth, as inline SVG.

It takes its colours from the page's CSS variables, so that it follows light and dark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from regraft.report.depth import MARK_LIMIT, Group, Module, block_of, energy, groups, mean, number, percent, total
from regraft.report.schema import PortedModule

_WIDTH, _LEFT, _RIGHT, _GAP = 960.0, 44.0, 8.0, 16.0
_FATE, _SHARE, _NEAR, _HEAD = 120.0, 44.0, 84.0, 30.0


@dataclass
class _Slot:
    group: Group
    x: float
    pitch: float

    @property
    def bar(self) -> tuple[float, float]:
        width = min(0.82 * self.pitch, 26.0)
        return self.x + (self.pitch - width) / 2, width


def _slots(marks: Sequence[Group]) -> list[_Slot]:
    parts = [list(members) for _, members in groupby(marks, key=lambda g: g.component)]
    room = _WIDTH - _LEFT - _RIGHT - _GAP * (len(parts) - 1)
    # A component of few modules beside one of many still needs the width of its own name.
    units = [max(len(part), 0.1 * len(marks)) for part in parts]
    slots, x = [], _LEFT
    for part, unit in zip(parts, units, strict=True):
        pitch = room * unit / sum(units) / len(part)
        slots += [_Slot(group, x + i * pitch, pitch) for i, group in enumerate(part)]
        x += pitch * len(part) + _GAP
    return slots


def _fates(module: Module) -> dict[str, float]:
    """How the module's own update divides: the parts sum to 1."""
    if module.status != "ported":
        return {module.status: 1.0}
    if not isinstance(module, PortedModule) or module.energy_kept is None:
        return {"unmeasured": 1.0}
    kept = min(max(module.energy_kept, 0.0), 1.0)
    cut = min(module.cut_loss or 0.0, 1.0 - kept)
    return {"kept": kept, "cut": cut, "lost": 1.0 - kept - cut}


def _part(name: str) -> Callable[[Module], float]:
    return lambda module: _fates(module).get(name, 0.0)


FATES = {
    "kept": "energy kept",
    "unmeasured": "ported",
    "lost": "lost in the transport",
    "cut": "lost by the cut to the rank",
    "skipped": "skipped: no place in the new base",
    "refused": "refused",
}

#: The same words before it is done.
PLANNED = {"unmeasured": "to be ported", "skipped": "to be skipped: no place in the new base"}


def _words(group: Group) -> str:
    """The hover text of one mark."""
    heads = [f"{group.count(s)} {s}" for s in ("ported", "skipped", "refused") if group.count(s)]
    many = len(group.modules) > 1
    lines = [group.name + (f" ({len(group.modules)} modules: {', '.join(heads)})" if many else f": {heads[0][2:]}")]
    if group.kept is not None:
        lines.append(f"energy kept {percent(group.kept)}")
        cut = group.fraction(_part("cut"))
        lines += [f"lost by the cut {percent(cut)}"] if cut > 0 else []
    lines += [f"share of the update {percent(group.share)}"] if group.share is not None else []
    sims, drifts = group.similarities, group.distances
    spread = f" ({min(sims):.2f} to {max(sims):.2f})" if len(sims) > 1 else ""
    lines += [f"weight similarity {number(mean(sims))}{spread}"] if sims else []
    lines += [f"relative drift {number(mean(drifts))}"] if drifts else []
    reasons = list(dict.fromkeys(m.reason for m in group.modules if m.status != "ported" and m.reason))
    return "\n".join(lines + reasons[:3])


def _rect(x: float, y: float, w: float, h: float, style: str) -> str:
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _lane(y: float, height: float, title: str, ticks: dict[float, str]) -> str:
    rows = [_text(_LEFT, y - 8, title, "lane")]
    for at, label in ticks.items():
        line = y + height * (1 - at)
        rows += [_line(_LEFT, line, _WIDTH - _RIGHT, line, "grid"), _text(_LEFT - 6, line + 3.5, label, "tick end")]
    return "".join(rows)


def _fate_bar(slot: _Slot, y: float) -> str:
    x, width = slot.bar
    rows, top = [], y + _FATE
    for name in ("kept", "unmeasured", "cut", "lost", "skipped", "refused"):
        height = _FATE * slot.group.fraction(_part(name))
        if height > 0.05:
            top -= height
            rows.append(_rect(x, top, width, height, name))
    if any(energy(m) > 1.0005 for m in slot.group.modules):
        # More energy than came in: the bar can't show it, a cap above says so.
        rows.append(_rect(x, y - 4, width, 2.5, "over"))
    return "".join(rows)


def _share_bar(slot: _Slot, y: float, top: float) -> str:
    x, width = slot.bar
    rows, base = [], y + _SHARE
    for status, style in (("ported", "unmeasured"), ("skipped", "skipped"), ("refused", "refused")):
        share = total(m.share for m in slot.group.modules if m.status == status) or 0.0
        height = _SHARE * share / top
        if height > 0:
            base -= height
            rows.append(_rect(x, base, width, height, style))
    return "".join(rows)


def _near_marks(slot: _Slot, y: float) -> str:
    def at(value: float) -> float:
        return y + _NEAR * (1 - min(max(value, 0.0), 1.0))

    middle, radius = slot.x + slot.pitch / 2, min(max(0.32 * slot.pitch, 1.6), 4.0)
    rows, sims, drift = [], slot.group.similarities, mean(slot.group.distances)
    if len(sims) > 1:
        rows.append(_line(middle, at(min(sims)), middle, at(max(sims)), "whisker"))
    if drift is not None:
        r = radius * 1.1
        points = f"{middle:.1f},{at(drift) - r:.1f} {middle + r:.1f},{at(drift):.1f} "
        points += f"{middle:.1f},{at(drift) + r:.1f} {middle - r:.1f},{at(drift):.1f}"
        rows.append(f'<polygon class="drift" points="{points}"/>')
    if sims:
        rows.append(f'<circle class="similar" cx="{middle:.1f}" cy="{at(mean(sims) or 0):.1f}" r="{radius:.1f}"/>')
    return "".join(rows)


def _block_labels(slots: Sequence[_Slot], y: float) -> str:
    """Brackets under the marks of a block, with as long a name as fits: ``down_blocks.0``, ``down 0``, ``0``."""
    rows: list[str] = []
    free = 0.0
    for block, members in groupby(slots, key=lambda s: block_of(s.group.modules[0].name)):
        run = list(members)
        left, right = run[0].x + 1, run[-1].x + run[-1].pitch - 1
        rows.append(_line(left, y + 4, right, y + 4, "bracket"))
        segments = block.split(".")
        tail = ".".join(segments[-2:]) if segments[-1].isdecimal() else segments[-1]
        for label in (tail, re.sub(r"_?(blocks?)", "", tail).replace(".", " "), segments[-1]):
            half, middle = 3.2 * len(label), (left + right) / 2
            if 2 * half <= right - left + 6 and middle - half >= free and len(label) > 0:
                rows.append(_text(middle, y + 17, label, "tick mid"))
                free = middle + half + 3
                break
        else:
            label, middle = segments[-1][:6], (left + right) / 2
            if middle - 3.2 * len(label) >= free and segments[-1].isdecimal():
                rows.append(_text(middle, y + 17, label, "tick mid"))
                free = middle + 3.2 * len(label) + 8
    return "".join(rows)


def _patterns(key: str) -> str:
    def hatch(name: str, size: int, path: str) -> str:
        return (
            f'<pattern id="{key}-{name}" width="{size}" height="{size}" patternUnits="userSpaceOnUse">'
            f'<rect class="{name}-ground" width="{size}" height="{size}"/>'
            f'<path class="{name}-ink" d="{path}"/></pattern>'
        )

    rules = "".join(
        f"#{key} .{name},.swatch .{name}{{fill:url(#{key}-{name})}}" for name in ("cut", "skipped", "refused")
    )
    marks = hatch("cut", 5, "M-1 1l2-2M0 5l5-5M4 6l2-2") + hatch("skipped", 6, "M-1 -1l8 8M-1 5l2 2M5 -1l2 2")
    return f"<defs>{marks}{hatch('refused', 6, 'M0 0l6 6M6 0l-6 6')}</defs><style>{rules}</style>"


@dataclass(frozen=True)
class Chart:
    """The picture and what a legend beside it needs."""

    svg: str
    legend: dict[str, str]
    marks: int
    modules: int
    has_similarity: bool
    has_drift: bool
    beyond: bool

    @property
    def by_block(self) -> bool:
        return self.marks < self.modules


def draw(modules: Iterable[Module], *, key: str = "chart", limit: int = MARK_LIMIT) -> Chart:
    """Draw the modules along depth: what was kept and lost of each, its share of the update, how near the bases are.

    Args:
        modules: of a check or a port record.
        key: prefix of the ids inside the picture, so that two charts can share a page.
        limit: over this many modules a mark stands for a block.
    """
    marks = groups(modules, limit)
    slots = _slots(marks)
    everything = [m for group in marks for m in group.modules]
    measured = any(isinstance(m, PortedModule) and m.energy_kept is not None for m in everything)
    top_share = max((group.share or 0.0 for group in marks), default=0.0)
    near = any(g.similarities or g.distances for g in marks)

    y, lanes, drawn = 26.0 + _HEAD, "", ["" for _ in slots]
    first = y
    one = "block" if len(marks) < len(everything) else "module"
    if measured or top_share == 0:
        lanes += _lane(y, _FATE, f"What became of each {one}'s update", {0: "0", 0.5: "50 %", 1: "100 %"})
        drawn = [old + _fate_bar(slot, y) for old, slot in zip(drawn, slots, strict=True)]
        y += _FATE + _HEAD
    if top_share > 0:
        lanes += _lane(y, _SHARE, f"Each {one}'s share of the whole update ‖ΔW‖²", {0: "0", 1: percent(top_share)})
        drawn = [old + _share_bar(slot, y, top_share) for old, slot in zip(drawn, slots, strict=True)]
        y += _SHARE + _HEAD
    if near:
        lanes += _lane(y, _NEAR, "How near the two bases are there", {0: "0", 0.5: "0.5", 1: "1"})
        drawn = [old + _near_marks(slot, y) for old, slot in zip(drawn, slots, strict=True)]
        y += _NEAR + _HEAD
    bottom = y - _HEAD

    heads = ""
    for component, members in groupby(slots, key=lambda s: s.group.component):
        run = list(members)
        n = sum(len(s.group.modules) for s in run)
        label = f"{component} · {n}" if run[-1].x + run[-1].pitch - run[0].x < 160 else f"{component} · {n} modules"
        heads += _text(run[0].x, 14, label, "component")
    body = "".join(
        f'<g class="mark"><title>{escape(_words(slot.group))}</title>'
        f"{_rect(slot.x, first, slot.pitch, bottom - first, 'hit')}{shapes}</g>"
        for slot, shapes in zip(slots, drawn, strict=True)
    )
    fates = FATES if any(isinstance(m, PortedModule) for m in everything) else {**FATES, **PLANNED}
    used = {name: words for name, words in fates.items() if any(g.fraction(_part(name)) > 0 for g in marks)}
    counts = ", ".join(f"{sum(m.status == s for m in everything)} {s}" for s in ("ported", "skipped", "refused"))
    desc = f"{len(everything)} modules in depth order: {counts}. The table below has every figure."
    svg = (
        f'<svg id="{key}" class="chart" viewBox="0 0 {_WIDTH:.0f} {bottom + 26:.0f}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">Modules along depth</title>'
        f'<desc id="{key}-desc">{escape(desc)}</desc>{_patterns(key)}{heads}{lanes}{body}'
        f"{_block_labels(slots, bottom)}</svg>"
    )
    sims, drifts = any(g.similarities for g in marks), any(g.distances for g in marks)
    beyond = any(d > 1 for g in marks for d in g.distances)
    return Chart(svg, used, len(marks), len(everything), sims, drifts, beyond)
