"""The part of docs/bridge.md that is written from results/bridge.json.

python -m tools.bench_bridge.page results/bridge.json docs/bridge.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.bench_bridge.summary import BRIDGE, DELTA, Goal, goals, shares, style_cases

from regraft.bench.table import markdown, replaced

BEGIN, END = "<!-- bridge: written by `python -m tools.bench_bridge` -->", "<!-- /bridge -->"
# Of ways whose figures tell what the others depend on.
_ABLATED = ("X-Adapter, ", "X-Adapter trained", "delta, ")
_STYLE = ["way", "style", "look", "thing", "share of style", "of look", "kept"]


def section(record: dict[str, Any]) -> str:
    """Tables of goals, styles, ablations, the ControlNet and cost, as Markdown."""
    found = record["summary"]
    parts = [*_goals(record), *_styles(record), *_nets(found["controlnet"]), *_cost(record.get("cost"))]
    commands = [f"`{command}`" for command in record["commands"]]
    return "\n\n".join([*parts, *commands, f"{_when(record)}."])


def page(text: str, record: dict[str, Any]) -> str:
    """A page with its part written anew.

    Args:
        text: of the page, with both marks.
        record: of the benchmark.
    """
    return replaced(text, BEGIN, END, section(record))


def _when(record: dict[str, Any]) -> str:
    """When and by which versions its figures were measured."""
    told = set(_stamps(record.get("measured", {})))
    return "; ".join(sorted(told)) or f"{record['date']}, regraft {record['regraft_version']}"


def _stamps(measured: Any) -> Iterator[str]:
    if isinstance(measured, str):
        yield measured
        return
    for part in measured.values():
        yield from _stamps(part)


def _goals(record: dict[str, Any]) -> list[str]:
    wanted, best = goals(record), record["summary"]["best_strength"]
    rows = [
        [
            goal.claim,
            f"≥ {goal.least:.2f}",
            f"{goal.measured:.2f}",
            "yes" if goal.reached else "**no**",
            f"{goal.held} of {len(goal.values)}",
        ]
        if goal.values
        else [goal.claim, f"≥ {goal.least:.2f}", *("–",) * 3]
        for goal in wanted
    ]
    told = []
    if best:
        case = next(case for case in style_cases(record) if best in case)
        came = shares(case, best)
        told += [
            f"Of all λ and schedules of delta sampling, on the first style and seed, most style times things came by "
            f"*{best}*: {came.get('style', 0.0):.2f} of the style, {came['concept']:.2f} of the things."
        ]
    return [_verdict(wanted), markdown(["goal", "asked", "measured", "reached", "in cases"], rows), *told]


def _verdict(wanted: Sequence[Goal]) -> str:
    """Which goals are reached, which are missed and by how much, in words."""
    known = [goal for goal in wanted if goal.values]
    missed = [goal for goal in known if not goal.reached]
    uneven = [goal for goal in known if goal.reached and goal.held < len(goal.values)]
    groups = {
        "Missed": [f"{goal.claim} ({goal.measured:.2f} of {goal.least:.2f})" for goal in missed],
        "Reached in the mean, not in every case": [
            f"{goal.claim} ({goal.held} of {len(goal.values)}, least {min(goal.values):.2f})" for goal in uneven
        ],
        "Not measured": [goal.claim for goal in wanted if not goal.values],
    }
    told = [f"**Goals reached: {len(known) - len(missed)} of {len(wanted)}**, by the mean over styles and seeds."]
    return " ".join([*told, *(f"{word}: {'; '.join(which)}." for word, which in groups.items() if which)])


def _styles(record: dict[str, Any]) -> list[str]:
    styles = record["summary"]["styles"]
    if not styles:
        return []
    plain = [way for way in styles if not way.startswith(_ABLATED)]
    ablated = [way for way in styles if way not in plain]
    cases = styles["native"]["cases"]
    seeds = max(len(rows) for rows in record["styles"].values())
    parts = [
        f"Styles, v1 → v3 of the demo (other width and autoencoder): {_several(len(record['styles']), 'style')} that "
        f"no mapper has seen, {_several(seeds, 'seed')}, {record['pictures']} pictures each, {record['steps']} steps. "
        "*Style* is the share of the pixels on the style's palette, *look* and *thing* the share of pictures in which "
        "a judge sees the style and what was asked for; *share* is the gain over the new base alone as a share of the "
        "native LoRA's, *kept* the things seen as a share of the native LoRA's.",
        markdown(_STYLE, [_style(way, styles[way], cases) for way in plain]),
    ]
    shown = record["summary"]["distilled"]
    if shown:
        told = ", ".join(
            f"{word} {shown[name]:.2f}" for word, name in (("style", "style"), ("look", "judge")) if name in shown
        )
        parts.append(
            f"*distilled*, share of what the bridge shows (gain over the new base alone as a share of X-Adapter's): "
            f"{told}; things kept, of X-Adapter's: {shown['concept']:.2f} ({_several(shown['cases'], 'case')})."
        )
    if ablated:
        parts += ["What it depends on, first style and seed:", markdown(_STYLE, _one_case(record, ablated))]
    return parts


def _one_case(record: dict[str, Any], ways: Sequence[str]) -> list[list[str]]:
    """Ways beside what they differ from, all of the case that they were measured on."""
    case = next(case for case in style_cases(record) if ways[0] in case)
    shown = [way for way in (BRIDGE, DELTA, *ways) if way in case]
    return [_style(way, {**case[way], "share": shares(case, way), "cases": 1}, 1) for way in shown]


def _nets(nets: dict[str, Any]) -> list[str]:
    if not nets:
        return []
    rows = [[way, *(f"{row[name]:.2f}" for name in ("agreement", "share", "concept"))] for way, row in nets.items()]
    return [
        f"A ControlNet of v1 on silhouettes, {_several(nets['native']['cases'], 'seed')}. *Agreement* is the "
        "intersection over union of what was asked for and what is drawn, *share* the gain over the new base alone "
        "as a share of a native ControlNet's.",
        markdown(["way", "agreement", "share", "thing"], rows),
    ]


def _cost(cost: dict[str, Any] | None) -> list[str]:
    if not cost:
        return []
    alone = cost["ways"]["new alone"]["seconds"]
    rows = [
        [
            way,
            f"{row['new_passes']:.2f}",
            f"{row['old_passes']:.2f}",
            f"{row['pictures']:.2f}",
            f"{row['seconds']:.3f}",
            f"{row['seconds'] / alone:.2f}",
        ]
        for way, row in cost["ways"].items()
    ]
    return [
        f"Cost of a step: {cost['pictures']} pictures at once, {cost['steps']} steps, "
        f"{_several(cost['threads'], 'thread')}, the median of {cost['runs']} runs after one to warm up, of the whole "
        "call by its steps; X-Adapter's holds the old base's own drawing. *Passes* are of a denoiser, *pictures* what "
        "both were run on for each picture: guidance runs one twice. What is ported, refined or distilled costs what "
        "the new base alone does.",
        markdown(["way", "passes: new", "passes: old", "pictures", "seconds", "× new alone"], rows),
    ]


def _style(way: str, row: dict[str, Any], cases: int) -> list[str]:
    few = "" if row["cases"] == cases else f" ({_several(row['cases'], 'case')})"
    share = row["share"]
    return [
        way + few,
        *(f"{row[name]:.2f}" for name in ("style", "judge", "concept")),
        *(f"{share[name]:.2f}" if name in share else "–" for name in ("style", "judge", "concept")),
    ]


def _several(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_bridge.page", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("page", type=Path)
    asked = parser.parse_args()
    record = json.loads(asked.record.read_text(encoding="utf-8"))
    asked.page.write_text(page(asked.page.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    main()
