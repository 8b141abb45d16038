"""Writes the tables of the families: ``python -m tools.make_families [table …]``.

Models are built on the meta device from public configurations, so that nothing is downloaded; the original names are
what the real converters make of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tools.make_families.compact import compact
from tools.make_families.models import MODELS, Model
from tools.make_families.trace import assembled, believed, traced

from regraft.families._tables import fill
from regraft.families._templates import expand

FOLDER = Path(__file__).parents[2] / "src" / "regraft" / "families" / "tables"


def parameters(model: Model) -> dict[str, tuple[int, ...]]:
    """Name → shape of everything in the state dict."""
    with torch.device("meta"):
        if model.library == "diffusers":
            made = getattr(diffusers, model.kind)(**model.config)
        else:
            kind = getattr(transformers, model.kind)
            made = kind(kind.config_class(**model.config))
    found = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    # Files and older libraries say text_model.; transformers 5 leaves it out of CLIPTextModel.
    return {name if name.startswith(model.level) else model.level + name: shape for name, shape in found.items()}


def table(model: Model) -> dict[str, Any]:
    """The content of a table's file."""
    shapes = parameters(model)
    content: dict[str, Any] = {"class": f"{model.library}.{model.kind}", "config": dict(model.config)}
    content["parameters"] = packed({name: list(shape) for name, shape in shapes.items()})
    if model.tied:
        content["tied"] = dict(model.tied)
    if model.rules is not None:
        named = {name: shape for name, shape in shapes.items() if name not in model.tied}
        belief = believed(model.rules(list(named)) if callable(model.rules) else model.rules, named)
        if model.convert is not None:
            original = traced(model.convert, belief, named)
        else:
            original = assembled(belief, named, model.chunks, model.swapped)
        content["original"] = packed(original)
        if model.spellings:
            content["spellings"] = {
                scheme: packed(_respelled(list(original), changes)) for scheme, changes in model.spellings.items()
            }
    else:
        content["original"] = "same"
    return content


def _respelled(names: list[str], changes: Any) -> dict[str, str]:
    found = {}
    for name in names:
        new = name
        for old, replacement in changes.items():
            new = new.replace(f".{old}.", f".{replacement}.")
        if name.startswith(("double_blocks.", "single_blocks.")) or new != name:
            found[new] = name
    return found


def packed(rows: dict[str, Any]) -> dict[str, Any]:
    """Templates of the rows, which expand to the very same rows in the same order."""
    short = compact(rows.items())
    again = expand(short.items()) if isinstance(next(iter(rows.values())), list) else expand(short.items(), fill)
    assert list(again) == list(rows.items())
    return short


def write(name: str, content: dict[str, Any]) -> None:
    """JSON with one line per row, so that a change shows as what it is."""
    lines = []
    for key, value in content.items():
        nested = isinstance(value, dict) and key in ("parameters", "original", "spellings")
        if key == "spellings":
            inner = ",\n".join(f"  {json.dumps(scheme)}: {_rows(rows, '   ')}" for scheme, rows in value.items())
            lines.append(f' "spellings": {{\n{inner}\n }}')
        else:
            lines.append(f" {json.dumps(key)}: {_rows(value, '  ') if nested else json.dumps(value)}")
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _rows(rows: dict[str, Any], indent: str) -> str:
    body = ",\n".join(f"{indent}{json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items())
    return f"{{\n{body}\n{indent[:-1]}}}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.make_families", description="Write families/tables.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all unless given: {', '.join(MODELS)}")
    names = parser.parse_args(argv).names
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"no table is named {unknown[0]}")
    for name in names or MODELS:
        write(name, table(MODELS[name]))


if __name__ == "__main__":
    main()
