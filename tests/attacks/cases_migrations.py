"""Migrations and lineages that are broken, each by a word of its own."""

from __future__ import annotations

import json
from typing import Any

import torch
from attack_cases import NAME, attack, content, saved
from safetensors.torch import save

KEY, LINEAGE = "regraft_migration", "regraft_lineage"
MIGRATION = "m.safetensors"
ANY = ("check", "port")
_ALL = {"kind": "lora", "scale": "one", "modules": {"unet": ["{0-999999}.{0-999999}"]}}
MANY = {"version": "1.0", "base": {"fingerprint": "v1:0"}, "updates": [_ALL]}


def migration(header: object, text: str | None = None, **tensors: torch.Tensor) -> Any:
    told = json.dumps(header) if text is None else text
    return content(save(tensors or {"empty": torch.zeros(0)}, {KEY: told}), MIGRATION)


for _name, _build in (
    ("a migration that is none", content(save({"a": torch.ones(1)}), MIGRATION)),
    ("a migration that is empty", content(b"", MIGRATION)),
    ("a migration whose header is no JSON", migration(0, "{")),
    ("a migration whose header is a list", migration([])),
    ("a migration whose header is empty", migration({})),
    ("a migration of version 999", migration({"version": "999.0"})),
    ("a migration of a version in words", migration({"version": "\x1b[2J"})),
    ("a migration 100,000 deep", migration(0, '{"a":' * 100_000)),
    ("a migration with a key twice", migration(0, '{"version": "1.0", "version": "1.1"}')),
    ("a migration with NaN", migration(0, '{"version": "1.0", "x": NaN}')),
    ("a migration with modules in words", migration({"version": "1.0", "modules": "all"})),
    ("a migration of version 0 without modules", migration({"version": 0})),
):
    attack(_name, _build, f"{MIGRATION}: .*(migration|twice|truncated|read)", verbs=ANY, role="migration")

for _name, _text in (
    ("a lineage that is no JSON", "{"),
    ("a lineage that is a list", "[]"),
    ("a lineage that is empty", "{}"),
    ("a lineage 100,000 deep", '{"a":' * 100_000),
    ("a lineage of version 999", '{"version": "999.0", "base": {}}'),
    ("a lineage with a key twice", '{"version": "1.0", "version": "1.0"}'),
    ("a lineage with NaN", '{"version": "1.0", "base": NaN}'),
    ("a lineage that names 10^12 modules", json.dumps(MANY)),
    ("a lineage of 20 MB", '{"version": "1.0", "x": "' + "y" * (20 << 20) + '"}'),
    ("a lineage that drives the terminal", '{"version": "\\u001b[2J\\u202e"}'),
):
    attack(_name, saved({}, {LINEAGE: _text}), f"{NAME}: .*({LINEAGE}|lineage)", verbs=("port",))
