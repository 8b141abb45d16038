"""PEFT's config: every sort of broken JSON, numbers that are none, patterns that would hang, links that lead away."""

from __future__ import annotations

import json
import os
from pathlib import Path

from attack_cases import GOOD_CONFIG, MODULE, Build, attack, folder, numbers
from safetensors.torch import save_file

FILE = "adapter_config.json: "
FINE = ("inspect", "check", "port", "convert")
TEXT = json.dumps(GOOD_CONFIG)

for _name, _data, _says in (
    ("a config that is no JSON", "{ not json", "can't be read as JSON .*Get it again"),
    ("an empty config", "", "can't be read as JSON .*Get it again"),
    ("a config that is a list", "[1, 2]", "is not a JSON object. Get"),
    ("a config that is a string", '"LORA"', "is not a JSON object. Get"),
    ("a config that is null", "null", "is not a JSON object. Get"),
    ("a config that is a number", "8", "is not a JSON object. Get"),
    ("a config 100,000 deep", '{"a":' * 100_000, "is JSON too deep to be read. No tool"),
    ("a config of lists 100,000 deep", "[" * 100_000, "is JSON too deep to be read. No tool"),
    ("a config with a key twice", '{"r": 2, "r": 4, "lora_alpha": 4}', "r: is there twice. Keep one"),
    ("a config in UTF-16", TEXT.encode("utf-16"), "(can't be read as JSON|lora)"),
    ("a config that is not UTF-8", b'{"r": "\xff"}', "can't be read as JSON .*Get it again"),
    ("a config of two documents", TEXT + TEXT, "can't be read as JSON .*Get it again"),
    ("a config with a comment", "// mine\n" + TEXT, "can't be read as JSON .*Get it again"),
    ("a config cut short", TEXT[:-5], "can't be read as JSON .*Get it again"),
    ("a config of a number with 5,000 digits", '{"r": ' + "9" * 5000 + "}", "can't be read as JSON .*Get it again"),
):
    if _name != "a config in UTF-16":
        attack(_name, folder(_data), FILE + _says)

# json tells UTF-16 and a mark of byte order by themselves.
attack("a config in UTF-16", folder(TEXT.encode("utf-16")), verbs=(), fine=FINE)
attack("a config with a mark of byte order", folder(b"\xef\xbb\xbf" + TEXT.encode()), verbs=(), fine=FINE)

for _name, _change, _says in (
    ("no r", {"r": None}, "r: is missing. Give"),
    ("r in words", {"r": "two"}, "r: must be a number, not 'two'. Give"),
    ("r that is true", {"r": True}, "r: must be a number, not True. Give"),
    ("r that is a list", {"r": [2]}, r"r: must be a number, not \[2\]. Give"),
    ("r NaN", {"r": float("nan")}, "r: must be a number, not nan. Give"),
    ("r with 400 digits", {"r": 10**400}, "r: must be a number, not one beyond all floats. Give"),
    ("no lora_alpha", {"lora_alpha": None}, "lora_alpha: is missing. Give"),
    ("lora_alpha Inf", {"lora_alpha": float("inf")}, "lora_alpha: must be a number, not inf. Give"),
    (
        "lora_alpha with 400 digits",
        {"lora_alpha": -(10**400)},
        "lora_alpha: must be a number, not one beyond all floats. Give",
    ),
    (
        "lora_alpha that drives the terminal",
        {"lora_alpha": "\x1b[2J"},
        r"lora_alpha: must be a number, not '\\x1b\[2J'. Give",
    ),
    ("lora_alpha of 2 MB", {"lora_alpha": "9" * 2_000_000}, "lora_alpha: must be a number, not '9+…9+'. Give"),
    (
        "alpha_pattern that is a list",
        {"alpha_pattern": ["to_q"]},
        "alpha_pattern: must map module names to numbers. Give",
    ),
    ("rank_pattern that is a string", {"rank_pattern": "to_q"}, "rank_pattern: must map module names to numbers. Give"),
    (
        "a pattern with a string",
        {"alpha_pattern": {"to_q": "4"}},
        "alpha_pattern: 'to_q' must have a number, not '4'. Give",
    ),
    (
        "a pattern with null",
        {"rank_pattern": {"to_q": None}},
        "rank_pattern: 'to_q' must have a number, not None. Give",
    ),
    (
        "a pattern with NaN",
        {"alpha_pattern": {"to_q": float("nan")}},
        "alpha_pattern: 'to_q' must have a number, not nan. Give",
    ),
    (
        "a pattern with 400 digits",
        {"alpha_pattern": {"to_q": 10**400}},
        "alpha_pattern: 'to_q' must have a number, not one beyond",
    ),
    (
        "a pattern that is no expression",
        {"rank_pattern": {"(": 2}},
        r"rank_pattern: '\(' is no regular expression. Give",
    ),
    (
        "a pattern that looks back",
        {"rank_pattern": {r"(a+)\1": 2}},
        "rank_pattern: .* which no module name needs. Give",
    ),
    (
        "a pattern that looks ahead",
        {"rank_pattern": {"(?=a)a": 2}},
        "rank_pattern: .* which no module name needs. Give",
    ),
    (
        "a pattern of 100,000 repetitions",
        {"rank_pattern": {"a{1,100000}": 2}},
        "rank_pattern: .* has too many repetitions, .* Give",
    ),
    ("a pattern nested 10,000 deep", {"rank_pattern": {"(" * 10_000 + ")" * 10_000: 2}}, "rank_pattern: .* Give"),
    (
        "target_parameters that is a number",
        {"target_parameters": 3},
        "target_parameters: must be a list of names. Give",
    ),
):
    attack(_name, folder(_change), FILE + _says)

# Python's own engine would need years for each of these; the test must end in a moment.
BOMBS = ("(a+)+$", "(a|a)*b", "(.*)*x", "(.*.*.*.*.*.*.*.*)z", "([a-z]+)*[0-9]{9}", "(a?){60}a{60}b", "(.*a){25}q")
for _bomb in BOMBS:
    attack(
        f"a pattern that explodes: {_bomb}",
        folder({"rank_pattern": {_bomb: 2}, "alpha_pattern": {_bomb: 4}}),
        verbs=(),
        fine=FINE,
    )

for _name, _change in (
    ("use_rslora in words", {"use_rslora": "no"}),
    ("auto_mapping that is a list", {"auto_mapping": [1]}),
    ("auto_mapping 1 MB long", {"auto_mapping": {"base_model_class": "a" * 1_000_000}}),
    ("a base's name that is a table", {"base_model_name_or_path": {"a": ["b"]}}),
    ("a base's name that drives the terminal", {"base_model_name_or_path": "\x1b[2J\x9b\u202e[/]<script>"}),
    ("a base's name that is a lone surrogate", {"base_model_name_or_path": "\ud800"}),
    ("target_modules that is a number", {"target_modules": 5}),
    ("target_modules that is a bomb", {"target_modules": "(a+)+$"}),
    ("layers_to_transform in words", {"layers_to_transform": "all", "layers_pattern": "(a+)+$"}),
    ("modules_to_save that is a table", {"modules_to_save": {"a": 1}}),
    ("fields that nobody knows", {"__class__": "os.system", "x" * 1000: [[[]]], "": None}),
    ("megatron_config that runs on", {"megatron_config": {"a": {"b": {"c": {}}}}, "loftq_config": "x"}),
):
    attack(_name, folder(_change), verbs=(), fine=("inspect", "check", "port"))
for _kind in ("LOHA", "VERA", "FOURIERFT", "XLORA", "", 3, ["LORA"], {"a": 1}, "\x1b"):
    attack(f"peft_type {_kind!r}", folder({"peft_type": _kind}), verbs=(), fine=("inspect",))


def _random_directions(kind: str, config: dict[str, object], n: int = 3) -> Build:
    """A folder of VeRA or FourierFT on one module of the base, with something changed in its config."""
    keys = {"VERA": {"vera_lambda_b": 8, "vera_lambda_d": n}, "FOURIERFT": {"fourierft_spectrum": n}}[kind]
    whole = {"r": n, "save_projection": False, "scaling": 1.0, "random_loc_seed": 1, "n_frequency": n}

    def build(place: Path) -> str:
        opened = folder({"peft_type": kind, **whole, **config})(place)
        tensors = {f"base_model.model.{MODULE}.{name}": numbers(size) for name, size in keys.items()}
        save_file(tensors, place / opened / "adapter_model.safetensors")
        return opened

    return build


for _name, _kind, _change, _says in (
    ("a VeRA whose r would fill the memory", "VERA", {"r": 10**12}, "but the config's r is 1000000000000. Give"),
    ("a VeRA whose r is no number", "VERA", {"r": "3"}, FILE + "r: must be a whole number above 0, not '3'. Give"),
    (
        "a VeRA whose seed no generator takes",
        "VERA",
        {"projection_prng_key": 10**30},
        FILE + "projection_prng_key: must be a whole number of 64 bits, not one beyond 64 bits. Give",
    ),
    (
        "a FourierFT whose n_frequency would fill the memory",
        "FOURIERFT",
        {"n_frequency": 10**12},
        "but the config's n_frequency is 1000000000000. Give",
    ),
    ("a FourierFT without a seed", "FOURIERFT", {"random_loc_seed": None}, FILE + "random_loc_seed: is missing. Give"),
):
    attack(_name, _random_directions(_kind, _change), _says)
attack(
    "a VeRA whose projections would fill the memory",
    _random_directions("VERA", {}, 1 << 15),
    "projections vera_A and vera_B are not in the file. Save",
)
attack(
    "a FourierFT with more numbers than its weight",
    _random_directions("FOURIERFT", {}, 65),
    "most of the adapter's modules do not fit it. Give",
    verbs=("port",),
    fine=("inspect",),
    code=3,
)
_BOMB = _random_directions("FOURIERFT", {"n_frequency_pattern": {"(a+)+$": 5}})
attack("a FourierFT with a pattern that is a bomb", _BOMB, verbs=(), fine=("inspect", "port"))


def _large_config(place: Path) -> str:
    opened = folder({})(place)
    os.truncate(place / opened / "adapter_config.json", 1 << 40)
    return opened


attack(
    "a config that claims 1 TB", _large_config, FILE + "(has 1099511627776 bytes, too many|claims 1099511627776 bytes)"
)


def _config_is_a_folder(place: Path) -> str:
    opened = folder({})(place)
    (place / opened / "adapter_config.json").unlink()
    (place / opened / "adapter_config.json").mkdir()
    return opened


attack("a config that is a folder", _config_is_a_folder, verbs=(), fine=("inspect",))


def _config_is_a_pipe(place: Path) -> str:
    opened = folder({})(place)
    (place / opened / "adapter_config.json").unlink()
    os.mkfifo(place / opened / "adapter_config.json")
    return opened


attack("a config that is a pipe", _config_is_a_pipe, verbs=(), fine=("inspect",))


def _config_links_away(place: Path) -> str:
    opened = folder({})(place)
    (place / opened / "adapter_config.json").unlink()
    (place / opened / "adapter_config.json").symlink_to("/etc/passwd")
    return opened


attack("a config that is a link to /etc/passwd", _config_links_away, FILE + r"can't be read as JSON \((?!.*root)")


def _no_weights(place: Path) -> str:
    opened = folder({})(place)
    (place / opened / "adapter_model.safetensors").unlink()
    return opened


attack("a folder with a config alone", _no_weights, "lora: this folder holds no adapter weights. Expected")
