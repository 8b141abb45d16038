"""docs/measured.md from the result files, each table with the command that made it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

_TASKS = {"film": "Film snippets", "tweets": "Tweets"}
_ROWS = {"none": "no adapter", "lora": "the LoRA"}


def page(folder: Path) -> str:
    """The whole page, from every result file in ``folder`` that this tool makes."""
    parts = [
        "# Measured on real pairs",
        "Made by `python -m tools.bench_real tables` from the files in `results/`; what each figure means stands in "
        "`tools/bench_real/README.md`. Mean ± standard deviation over seeds.",
    ]
    for name, section in (("real-minilm.json", _minilm), ("real-sceptr.json", _sceptr)):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            parts += [*section(content), _made(content)]
    return "\n\n".join(parts) + "\n"


def _made(content: Figures) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return f"```\n{content['command']}\n```\n\n{content['date']}; {versions}; one CPU thread."


def _figure(value: Figures | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    spread = f" ± {value['std']:.{digits}f}" if value["std"] is not None else ""
    return f"{value['mean']:.{digits}f}{spread}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _each(values: Iterable[object]) -> str:
    """``survives`` for three alike, ``survives, refine`` for others."""
    return ", ".join(dict.fromkeys(map(str, values)))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _minilm(content: Figures) -> Iterable[str]:
    recipe = content["recipe"]
    yield "## all-MiniLM-L6-v2 → its fine-tune, a sentiment LoRA"
    yield (
        f"{content['pair']}. PEFT LoRA of rank {recipe['rank']} with a linear head on mean-pooled vectors, "
        f"{recipe['n_train']:,} texts, {recipe['epochs']} epochs; accuracy on {recipe['n_test']} texts. Ported by "
        "`regraft port`, loaded by `PeftModel.from_pretrained` on the new base."
    )
    for task, found in content["tasks"].items():
        seeds = found["seeds"]
        yield f"### {_TASKS[task]} ({len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}: {', '.join(seeds)})"
        checks = [seed["check"] for seed in seeds.values()]
        moved = _mean(seed.get("outputs_cosine") for seed in seeds.values())
        yield (
            f"`regraft check`: **{_each(check['verdict'] for check in checks)}**; "
            f"similarity {_mean(check['similarity'] for check in checks):.4f}, "
            f"drift under the adapter {_mean(check['distance'] for check in checks):.4f}."
            + (f" Cosine of the two bases' vectors of one text: {moved:.2f}." if moved is not None else "")
        )
        head = ("base", "adapter", "head kept", "head retrained", "best head", "effect cosine", "effect norm ratio")
        rows = [
            [side, _ROWS.get(name, name) if side == "old" or name == "none" else name, *_accuracies(row)]
            for side in ("old", "new")
            for name, row in sorted(found["summary"].get(side, {}).items(), key=lambda item: item[0] != "none")
        ]
        yield _table(head, rows)
        ports = [row for seed in seeds.values() for row in seed.get("ports", {}).values()]
        seconds = [row["cpu_seconds"] for row in ports if "cpu_seconds" in row]
        if seconds:
            took = f"{min(seconds):.0f} to {max(seconds):.0f} s of processor time"
            yield f"A port takes {took}, start of the program included."
        yield from _verified(seeds)


def _accuracies(row: Figures) -> list[str]:
    accuracies = [_figure(row.get(key)) for key in ("kept", "retrained", "best")]
    return [*accuracies, *(_figure(row.get(key), 2) for key in ("effect_cosine", "effect_norm_ratio"))]


def _verified(seeds: Figures) -> Iterable[str]:
    records = [seed["verify"] for seed in seeds.values() if (seed.get("verify") or {}).get("effect_cosine")]
    if not records:
        return
    ways = {"ported by auto": records, **{name: [r["controls"][name] for r in records] for name in ("copy", "random")}}
    rows = [
        [name, *(_interval(_mean(r[key]["mean"] for r in rows)) for key in ("effect_cosine", "effect_norm_ratio"))]
        for name, rows in ways.items()
    ]
    yield f"`regraft verify` on {records[0]['n_inputs']} of the test texts, token by token:"
    yield _table(("adapter on the new base", "effect cosine", "effect norm ratio"), rows)


def _interval(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _sceptr(content: Figures) -> Iterable[str]:
    yield "## SCEPTR → its fine-tune, siblings, another width"
    yield (
        f"Old base: {content['old']}. A LoRA of rank 4 that writes the hydropathy of the last loop along one "
        "direction of the vector; figures compare what it does on the old base with what its port does on the new one, "
        "on made-up receptors. Against a refusal, ports were forced; a dash where even that has nothing to carry."
    )
    head = ["new base", "LoRA on", "verdict", "similarity", "drift", "exit code of a port", "file written"]
    rows = []
    for pair in content["pairs"]:
        summary, seeds = pair["summary"], pair["seeds"].values()
        plain = [seed.get("port_without_force") or {**seed["new"]["auto"], "wrote": True} for seed in seeds]
        rows.append(
            [
                f"{pair['new']} ({pair['relation']})",
                pair["adapter"],
                f"**{_each(summary['verdicts'])}**",
                _figure(summary["similarity"], 2),
                _figure(summary["distance"], 2),
                _each(run["exit_code"] for run in plain),
                _each("yes" if run["wrote"] else "no" for run in plain),
            ]
        )
    yield _table(head, rows)
    figures = {
        "task": "task",
        "effect cosine": "effect_cosine",
        "effect norm ratio": "effect_norm_ratio",
        "similarities' changes": "similarity_correlation",
    }
    rows = []
    for adapter, summary in {pair["adapter"]: pair["summary"] for pair in content["pairs"]}.items():
        for name, key in (("no adapter", "task_without"), ("the LoRA", "task")):
            rows.append(["the old one", adapter, name, _figure(summary["old"][key], 2), "–", "–", "–"])
    rows += [
        [pair["new"], pair["adapter"], _ROWS.get(name, name), *(_figure(row[key], 2) for key in figures.values())]
        for pair in content["pairs"]
        for name, row in sorted(pair["summary"]["new"].items(), key=lambda item: item[0] != "none")
    ]
    yield _table(["new base", "LoRA on", "method", *figures], rows)
