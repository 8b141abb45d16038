"""The records as one self-contained HTML page: no script, nothing loaded from anywhere.

Names and metadata come from strangers' files, so every value passes through the templates' autoescape.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from regraft._version import __version__
from regraft.report import chart, depth
from regraft.report.demo_schema import DemoReport
from regraft.report.public import without_folders, without_pictures
from regraft.report.refine_schema import RefineReport, verdict_of
from regraft.report.schema import (
    SCHEMA_VERSION,
    CheckReport,
    Interval,
    Picture,
    PortReport,
    Record,
    VerifyReport,
)

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Banner:
    """The verdict in one word, with a shape and a tone: colour alone tells a part of the readers nothing."""

    word: str
    tone: str
    icon: str


GOOD, WARN, BAD = ("good", "check"), ("warn", "triangle"), ("bad", "octagon")


def check_banner(check: CheckReport) -> Banner:
    word, look = {
        "survives": ("Survives", GOOD),
        "refine": ("Needs a refine", WARN),
        "refused": ("Refused", BAD),
    }[check.verdict]
    return Banner(word, *look)


def port_banner(port: PortReport) -> Banner:
    if port.forced:
        return Banner("Forced", *WARN)
    if port.verdict == "refused" or not port.counts.ported:
        return Banner("Refused" if port.verdict == "refused" else "Nothing ported", *BAD)
    if port.verdict == "refine":
        return Banner("Ported, refine advised", *WARN)
    return Banner("Ported", *GOOD)


def refine_banner(refine: RefineReport | None) -> Banner:
    """Of a refine; None is one that was not possible."""
    if refine is None:
        return Banner("Not possible yet", *WARN)
    word, tone = verdict_of(refine)
    return Banner(word, *{"good": GOOD, "warn": WARN, "bad": BAD}[tone])


MEASURED = Banner("Measured", "neutral", "gauge")


def render_port(port: PortReport, *, check: CheckReport | None = None, verify: VerifyReport | None = None) -> str:
    """The page beside a ported adapter.

    Args:
        port: what was done.
        check: the forecast made before it, if there is one.
        verify: what both models showed afterwards, if they were run.
    """
    port, check, verify = _expect(port, PortReport), _maybe(check, CheckReport), _maybe(verify, VerifyReport)
    return _page("port", banner=port_banner(port), port=port, check=check, verify=verify)


def render_check(check: CheckReport) -> str:
    """The page of a forecast."""
    check = _expect(check, CheckReport)
    return _page("check", banner=check_banner(check), check=check)


def render_verify(verify: VerifyReport) -> str:
    """The page of a measurement."""
    return _page("verify", banner=MEASURED, verify=_expect(verify, VerifyReport))


def render_demo(demo: DemoReport) -> str:
    """The demo's page: the contact sheet of the near upgrade and of the refused ones."""
    demo = _expect(demo, DemoReport)
    near = demo.near
    return _page("demo", banner=port_banner(near.port), demo=demo, port=near.port, check=near.check, verify=near.verify)


def _expect(record: R, wanted: type[R]) -> R:
    if not isinstance(record, wanted):
        raise TypeError(f"this page shows a {wanted.__name__}, not a {type(record).__name__}")
    return without_folders(record)


def _maybe(record: R | None, wanted: type[R]) -> R | None:
    return None if record is None else _expect(record, wanted)


# ---- pictures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One picture with the size it is shown at."""

    data: str
    width: int
    height: int
    scale: int

    @property
    def pixelated(self) -> bool:
        return self.scale > 1


def cell(png: str) -> Cell | None:
    """A PNG in base64 with its size from the header; ``None`` for anything else, so that nothing else is embedded."""
    try:
        head = base64.b64decode(png, validate=True)[:24]
    except (binascii.Error, ValueError):
        return None
    if len(head) < 24 or head[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    width, height = struct.unpack(">II", head[16:24])
    if not (0 < width <= 8192 and 0 < height <= 8192):
        return None
    scale = max(1, 128 // max(width, height))
    shrink = min(1.0, 256 / max(width, height))
    return Cell(png, max(1, round(width * shrink)), max(1, round(height * shrink)), scale)


@dataclass(frozen=True)
class Column:
    """One column of the contact sheet."""

    picture: Picture
    cells: list[Cell | None]
    first: bool
    same_as: str


def columns(pictures: Iterable[Picture], rows: int, same: Iterable[tuple[str, str]] = ()) -> list[Column]:
    found, group, twins = [], None, {late: early for early, late in same}
    for picture in pictures:
        cells = [cell(png) for png in picture.png[:rows]] + [None] * max(0, rows - len(picture.png))
        found.append(Column(picture, cells, picture.group != group, twins.get(picture.title, "")))
        group = picture.group
    return found


def drawn(verify: VerifyReport) -> list[str]:
    """The prompts that pictures were made for, the first ones; all of them where no picture can be shown."""
    rows = (len(picture.png) for picture in verify.pictures if any(map(cell, picture.png)))
    return verify.prompts[: max(rows, default=len(verify.prompts))]


def column_groups(sheet: Iterable[Column]) -> list[tuple[str, int]]:
    """Each heading and how many neighbouring columns stand under it."""
    return [(group, len(list(members))) for group, members in groupby(sheet, key=lambda c: c.picture.group)]


# ---- figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Places an interval on an axis from ``low`` to ``high``, in percent of its width."""

    low: float
    high: float

    def at(self, value: float) -> float:
        if not math.isfinite(value):
            return 0.0
        return round(100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low), 2)


def scales(verify: VerifyReport) -> dict[str, Scale]:
    """One axis for each figure, common to the port and its controls."""
    rows = depth.effects(verify).values()

    def ends(intervals: Iterable[Interval | None]) -> list[float]:
        return [
            v for i in intervals if i is not None for v in (i.mean, i.low, i.high) if v is not None and math.isfinite(v)
        ]

    cosines, ratios, kls = (
        ends(r.effect_cosine for r in rows),
        ends(r.effect_norm_ratio for r in rows),
        ends(r.kl for r in rows),
    )
    return {
        "effect_cosine": Scale(min([0.0, *cosines]), 1.0),
        "effect_norm_ratio": Scale(0.0, max([1.2, *ratios])),
        "kl": Scale(0.0, max([*kls, 1e-9])),
    }


#: What each figure means, and what it does not; the page lists those that it shows.
MEANINGS = {
    "energy_kept": (
        "Energy kept",
        "‖ΔW ported‖² / ‖ΔW‖² of a module: how much of the update's norm came through.",
        "A diagnostic, not fidelity: norm can come through and the effect be lost, or the other way round.",
    ),
    "similarity": (
        "Weight similarity",
        "Cosine of the old and the new base's weight in a module, corrected for chance: 1 equal, 0 unrelated.",
        "Says how near the bases are, not how well this adapter works on the new one.",
    ),
    "distance": (
        "Relative drift",
        "‖W new − W old‖ / ‖W old‖ of a module: how far the upgrade moved the weight.",
        "Counts every direction alike, also those that the adapter never touches.",
    ),
    "share": (
        "Share of the update",
        "A module's part of ‖ΔW‖² over the whole adapter.",
        "Weight in norm; a light module can still matter for what is seen.",
    ),
    "forecast": (
        "Forecast",
        "Expected share of the gain that an adapter trained natively on the new base would have, with an interval.",
        "An estimate, fitted on ports that were measured on other bases. Not a measurement.",
    ),
    "effect_cosine": (
        "Effect cosine",
        "Does the adapter change the new base's outputs in the direction it changed the old one's? 1: it does.",
        "Says nothing of strength: read it together with the norm ratio.",
    ),
    "effect_norm_ratio": (
        "Effect norm ratio",
        "How strong that change is, beside the original's: 1 as strong, 0 no effect.",
        "A strong change in the wrong direction also has a high ratio.",
    ),
    "kl": (
        "KL",
        "How far the new base with the adapter stands from the old base with it, in nats per prediction; 0 equal.",
        "Also counts what the new base does differently by itself.",
    ),
    "style_share": (
        "Style share",
        "Part of the picture that shows the adapter's style, read from the pixels.",
        "Made for this demo's style; not a judgement of quality, and blind to whether the subject is still right.",
    ),
}


def _shown(
    port: PortReport | None, check: CheckReport | None, verify: VerifyReport | None, demo: DemoReport | None
) -> list[str]:
    modules: list[depth.Module] = [*(port.modules if port else ()), *(check.modules if check else ())]
    pictures = demo.columns if demo else verify.pictures if verify else []
    here = {name for name in ("similarity", "distance", "share") if any(getattr(m, name) is not None for m in modules)}
    here |= {"energy_kept"} if port and any(m.energy_kept is not None for m in port.modules) else set()
    here |= {"effect_cosine", "effect_norm_ratio"} if verify else set()
    here |= {"kl"} if verify and any(e.kl for e in depth.effects(verify).values()) else set()
    here |= {name for picture in pictures for name in picture.figures}
    if check and depth.forecasts_of(check):
        here.add("forecast")
    return [name for name in MEANINGS if name in here]


# ---- the page -----------------------------------------------------------------------------------------------------


@cache
def environment() -> Environment:
    env = Environment(
        loader=PackageLoader("regraft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        percent=depth.percent, whole=depth.whole_percent, number=depth.number, label=lambda name: name.replace("_", " ")
    )
    env.globals.update(
        meanings=MEANINGS,
        columns=columns,
        drawn=drawn,
        column_groups=column_groups,
        left_out=depth.left_out,
        after_word=depth.after_word,
        forecasts_of=depth.forecasts_of,
        further=depth.further,
        tiers=depth.TIERS,
        controls=depth.CONTROLS,
        two=depth.number,
        significant=depth.significant,
        in_order=depth.in_depth_order,
        total=depth.total,
        effects=depth.effects,
        scales=scales,
        check_banner=check_banner,
        refine_banner=refine_banner,
        version=__version__,
        schema_version=SCHEMA_VERSION,
    )
    return env


def _page(
    kind: str,
    *,
    banner: Banner,
    port: PortReport | None = None,
    check: CheckReport | None = None,
    verify: VerifyReport | None = None,
    demo: DemoReport | None = None,
) -> str:
    subject = port or check
    drawing = chart.draw(subject.modules) if subject and subject.modules else None
    records: dict[str, Record] = {"demo": demo} if demo else {}
    if not demo:
        records = {n: r for n, r in (("port", port), ("check", check), ("verify", verify)) if r is not None}
    template = environment().get_template("page.html")
    return template.render(
        kind=kind,
        banner=banner,
        port=port,
        check=check,
        verify=verify,
        demo=demo,
        subject=subject,
        chart=drawing,
        chart_svg=Markup(drawing.svg) if drawing else None,
        figures=_shown(port, check, verify, demo),
        records={name: without_pictures(record).to_json() for name, record in records.items()},
    )
