"""Safetensors files whose header lies, and files that are none."""

from __future__ import annotations

import gzip
import json
import pickle
import struct

import torch
from attack_cases import ALPHA, DOWN, FLAT, UP, attack, content, entry, good, numbers, only, raw, saved
from safetensors.torch import save

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WHOLE = save(good())
TRUNCATED = "lora.safetensors: is truncated. Download or copy it again"
JSON = "lora.safetensors: has a header that is not valid JSON. Download"
OUTSIDE = "lora.safetensors: has a tensor whose data lies outside of the file. Download"
DISAGREE = "lora.safetensors: has a tensor whose shape and size disagree. Download"
NONE = "lora.safetensors: is no safetensors file"

attack("an empty file", content(b""), TRUNCATED)
attack("seven bytes", content(b"\x01" * 7), TRUNCATED)
attack("cut in the header", content(WHOLE[:60]), TRUNCATED)
attack("cut in the data", content(WHOLE[:-3]), TRUNCATED)
attack("a header of 2^63 bytes", raw(b"{}", length=1 << 63), NONE)
attack("a header of 2^64 - 1 bytes", raw(b"{}", length=(1 << 64) - 1), NONE)
attack("a header of 101 MB in a file of 10 bytes", raw(b"{}", length=101 << 20), NONE)
attack("a header one byte longer than the file", raw(b"{}", length=3), TRUNCATED)
attack("a header of no bytes", raw(b""), "lora.safetensors: (has a header that is not|is truncated)")
attack("a header that is text", raw(b"hello, this is a header"), JSON)
attack("a header that is a list", raw(b"[1, 2]"), JSON)
attack("a header that is a string", raw(b'"text"'), JSON)
attack("a header cut within its JSON", raw(b'{"a":{"dtype":"F32","sha'), JSON)
attack("JSON nested 100,000 deep", raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), JSON)
attack("lists nested 100,000 deep in metadata", raw(b'{"__metadata__":{"a":' + b"[" * 100_000 + b"}"), JSON)
attack("a key that is not UTF-8", raw(b'{"\xff\xfe":' + json.dumps(ONE).encode() + b"}", bytes(8)), "not UTF-8")
attack("a mark of byte order before the header", raw(b"\xef\xbb\xbf{}"), JSON)
attack("a lone surrogate in a key", raw(b'{"\\ud800":' + json.dumps(ONE).encode() + b"}", bytes(8)), JSON)

_E = json.dumps(ONE).encode()
attack(
    "one key twice",
    raw(b'{"a":' + _E + b',"a":' + _E + b"}", bytes(8)),
    "lora.safetensors: a: is there twice. Keep one",
)
attack(
    "a metadata key twice",
    raw(b'{"__metadata__":{"ss_x":"1","ss_x":"2"},"a":' + _E + b"}", bytes(8)),
    "(ss_x: is there twice. Keep one|not valid JSON. Download)",
)
attack("metadata twice", raw(b'{"__metadata__":{},"__metadata__":{},"a":' + _E + b"}", bytes(8)), "(twice|JSON)")
attack(
    "a field of an entry twice",
    raw(b'{"a":{"shape":[2],' + _E[1:] + b"}", bytes(8)),
    "(shape: is there twice|not valid JSON)",
)

attack("two tensors in the same bytes", raw({"a": ONE, "b": ONE}, bytes(8)), OUTSIDE)
attack("overlapping tensors", raw({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12)), OUTSIDE)
attack("a hole between two tensors", raw({"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}}, bytes(20)), OUTSIDE)
attack("data that starts late", entry(data_offsets=[4, 12]), OUTSIDE)
attack("bytes behind the last tensor", raw({"a": ONE}, bytes(99)), TRUNCATED)
attack("offsets backwards", entry(data_offsets=[8, 0]), OUTSIDE)
attack("offsets beyond the end", entry(shape=[1 << 20], data_offsets=[0, 4 << 20]), TRUNCATED)
attack("negative offsets", entry(data_offsets=[-8, 0]), JSON)
attack("offsets of floats", entry(data_offsets=[0.0, 8.0]), JSON)
attack("three offsets", entry(data_offsets=[0, 4, 8]), JSON)
attack("no offsets", entry(data_offsets=None), JSON)
attack("offsets of 2^64", entry(data_offsets=[0, 1 << 64]), JSON)
attack("no dtype", entry(dtype=None), JSON)
attack("an unknown dtype", entry(dtype="F33"), JSON)
attack("a dtype that is a number", entry(dtype=32), JSON)
attack("no shape", entry(shape=None), JSON)
attack("a negative dimension", entry(shape=[-2]), JSON)
attack("a dimension that is a float", entry(shape=[2.0]), JSON)
attack("a dimension that is a string", entry(shape=["2"]), JSON)
attack("a dimension that is true", entry(shape=[True, 2]), JSON)
attack("a dimension that is null", entry(shape=[None]), JSON)
attack("a list as a dimension", entry(shape=[[2]]), JSON)
attack("a shape that is a number", entry(shape=2), JSON)
attack("a huge shape with tiny data", entry(shape=[1 << 40]), DISAGREE)
attack("a shape whose product overflows", entry(shape=[1 << 40, 1 << 40]), "lora.safetensors: .*(overflow|disagree)")
attack("a shape smaller than its data", entry(shape=[1]), DISAGREE)
attack(
    "an empty tensor of 2^63 columns",
    entry(shape=[0, 1 << 63], data_offsets=[0, 0]),
    "(no tensor can have|disagree|truncated)",
)
attack(
    "2^63 columns in a file of nothing",
    raw({UP: {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]}}),
    f"{UP}: has shape .*, which no tensor can have. ",
)
attack("100,000 dimensions", entry(shape=[1] * 100_000 + [2]), "has 100001 dimensions, which no tensor can have. ")
attack("an entry that is a list", raw({"a": [ONE]}), JSON)
attack("an entry that is null", raw({"a": None}), JSON)
attack("metadata that is a list", raw({"__metadata__": ["a"], "b": ONE}, bytes(8)), JSON)
attack("a metadata value that is a number", raw({"__metadata__": {"a": 1}, "b": ONE}, bytes(8)), JSON)
attack("a metadata value that is an object", raw({"__metadata__": {"a": {}}, "b": ONE}, bytes(8)), JSON)
attack("no tensors", raw(b"{}"), "lora.safetensors: holds no tensors")
attack("nothing but metadata", raw({"__metadata__": {"format": "pt"}}), "lora.safetensors: holds no tensors")
attack(
    "a name of 5,000 characters",
    raw({"a" * 5000: ONE}, bytes(8)),
    "lora.safetensors: a{60}…: is a name of 5000 characters. No tool",
)

# Files that are something else under this name.
attack("zeros", content(bytes(4096)), "lora.safetensors: ")
attack(
    "a git-lfs pointer",
    content(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"),
    "is a Git LFS pointer",
)
attack("a web page", content(b"<!DOCTYPE html>\n<html><body>404</body></html>" * 9), "is a web page")
attack("an error of a download in JSON", content(b'{"error":"Repository not found"}' * 4), NONE)
attack("a zip archive", content(b"PK\x03\x04" + bytes(100)), "lora.safetensors: is a zip archive. A PyTorch")
attack("a pickle", content(pickle.dumps({"a": 1})), "lora.safetensors: ")
attack("gzip", content(gzip.compress(WHOLE)), "lora.safetensors: is packed with gzip. Unpack")
attack("a GGUF file", content(b"GGUF" + struct.pack("<IQQ", 3, 0, 0)), "lora.safetensors: is a GGUF file. Give")
attack("safetensors within safetensors", content(struct.pack("<Q", len(WHOLE)) + WHOLE), "lora.safetensors: ")

# Dtypes.
attack("complex factors", saved({UP: numbers(8, 2).to(torch.complex64)}), f"{UP}: has dtype complex64, not a float. ")
attack("boolean factors", saved({UP: numbers(8, 2) > 0}), f"{UP}: has dtype bool, not a float. ")
attack("integer factors", saved({DOWN: torch.ones(2, 8, dtype=torch.int64)}), f"{DOWN}: has dtype int64, not a float. ")
attack(
    "quantised factors", saved({DOWN: torch.ones(2, 8, dtype=torch.uint8)}), f"{DOWN}: has dtype uint8, not a float. "
)
for _dtype, _shape in (("F8_E8M0", [8]), ("F4", [16]), ("U64", [1]), ("U16", [4]), ("F8_E4M3FNUZ", [8])):
    attack(f"dtype {_dtype}", entry(dtype=_dtype, shape=_shape), f"{UP}: dtype {_dtype} is not supported. Save it")
_F8 = {name: t.to(torch.float8_e4m3fn) for name, t in good().items() if name != ALPHA}
attack("8-bit floats", saved(_F8), verbs=(), fine=("inspect", "check", "port"))
attack("half of the pair in float16", saved({UP: numbers(8, 2).half()}), verbs=(), fine=("inspect", "check", "port"))
attack("factors in float64", saved({UP: numbers(8, 2).double()}), verbs=(), fine=("inspect", "check", "port"))
attack(
    "a whole checkpoint",
    only({"model.layers.0.mlp.weight": numbers(2, 2)}),
    "no known adapter format .* --from or --to",
)
attack(
    "a key of no module",
    only({f"{FLAT}_nowhere.lora_up.weight": numbers(8, 2), f"{FLAT}_nowhere.lora_down.weight": numbers(2, 8)}),
    "nowhere",
    verbs=("port",),
    fine=("inspect",),
)
