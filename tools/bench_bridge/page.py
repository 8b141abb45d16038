"""The part of docs/bridge.md that is written from results/bridge.json."""

from __future__ import annotations

from typing import Any

from regraft.bench.table import markdown, replaced

BEGIN, END = "<!-- bridge: written by `python -m tools.bench_bridge` -->", "<!-- /bridge -->"


def section(record: dict[str, Any]) -> str:
    """Tables of styles, ablations and the ControlNet, as Markdown."""
    found = record["summary"]
    styles = found["styles"]
    plain = [way for way in styles if not way.startswith(("X-Adapter, ", "X-Adapter trained", "delta, "))]
    ablated = [way for way in styles if way not in plain]
    cases = styles["native"]["cases"]
    seeds = max((len(rows) for rows in record["styles"].values()), default=0)
    parts = [
        f"Styles, v1 → v3 of the demo (other width and autoencoder): {_several(len(record['styles']), 'style')} that "
        f"no mapper has seen, {_several(seeds, 'seed')}, {record['pictures']} pictures each, {record['steps']} steps. "
        "*Style* is the share of the pixels on the style's palette, *look* and *thing* the share of pictures in which "
        "a judge sees the style and what was asked for; *share* is the gain over the new base alone as a share of the "
        "native LoRA's, *kept* the things seen as a share of the native LoRA's; *seconds* are for a picture, beside "
        "other work on two cores.",
        markdown(
            ["way", "style", "look", "thing", "share of style", "of look", "kept", "seconds"],
            [_style(way, styles[way], cases) for way in plain],
        ),
    ]
    if ablated:
        parts += [
            "What it depends on, first style and seed:",
            markdown(
                ["way", "style", "look", "thing", "share of style", "of look", "kept", "seconds"],
                [_style(way, styles[way], styles[way]["cases"]) for way in ablated],
            ),
        ]
    nets = found["controlnet"]
    if nets:
        parts += [
            f"A ControlNet of v1 on silhouettes, {_several(nets['native']['cases'], 'seed')}. *Agreement* is the "
            "intersection over union of what was asked for and what is drawn, *share* the gain over the new base alone "
            "as a share of a native ControlNet's.",
            markdown(
                ["way", "agreement", "share", "thing", "seconds"],
                [
                    [way, *(f"{row[name]:.2f}" for name in ("agreement", "share", "concept", "seconds"))]
                    for way, row in nets.items()
                ],
            ),
        ]
    return "\n\n".join([*parts, f"`{record['command']}`, {record['date']}."])


def page(text: str, record: dict[str, Any]) -> str:
    """A page with its part written anew.

    Args:
        text: of the page, with both marks.
        record: of the benchmark.
    """
    return replaced(text, BEGIN, END, section(record))


def _style(way: str, row: dict[str, Any], cases: int) -> list[str]:
    few = "" if row["cases"] == cases else f" ({_several(row['cases'], 'case')})"
    share = row["share"]
    return [
        way + few,
        *(f"{row[name]:.2f}" for name in ("style", "judge", "concept")),
        *(f"{share[name]:.2f}" if name in share else "–" for name in ("style", "judge", "concept")),
        f"{row['seconds']:.2f}",
    ]


def _several(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
