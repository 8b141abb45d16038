"""Files that are no files, links that lead away, names that are none; and bases of every broken kind."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from attack_cases import MODULE, NAME, PEFT_DOWN, PEFT_UP, attack, content, folder, good, numbers, only
from safetensors.torch import save, save_file

Build = Callable[[Path], str]
REGULAR = "is no regular file \\(a pipe or a device\\). Copy"


def made(make: Callable[[Path], object], name: str = NAME) -> Build:
    """Something made at the adapter's path."""

    def build(place: Path) -> str:
        make(place / name)
        return name

    return build


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _loop(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


def _holes(path: Path) -> None:
    """A valid header for a tensor of 256 GB, of which none is on the disk."""
    size = 1 << 38
    header = json.dumps(
        {"a.lora_up.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)


def _nothing(path: Path) -> None:
    pass


attack("a name of nothing", made(_nothing), "lora.safetensors: no such file. Check")
attack(
    "a folder under a file's name", made(Path.mkdir), "lora.safetensors: this folder holds no adapter weights. Expected"
)
attack("a pipe", made(os.mkfifo), "lora.safetensors: " + REGULAR)
attack("a socket", made(_socket), "lora.safetensors: " + REGULAR)
attack(
    "a link to a device without end", made(lambda path: path.symlink_to("/dev/zero")), "lora.safetensors: " + REGULAR
)
attack("a link to the terminal", made(lambda path: path.symlink_to("/dev/null")), "lora.safetensors: " + REGULAR)
attack("links in a circle", made(_loop), "lora.safetensors: can't be read .*(symbolic links|ELOOP).*Download")
attack("a link to nothing", made(lambda path: path.symlink_to("gone")), "lora.safetensors: no such file. Check")
attack(
    "a link to the password file", made(lambda path: path.symlink_to("/etc/passwd")), "lora.safetensors: (?!.*root).* "
)
attack("a file within a file", lambda place: _within(place), "file/lora.safetensors: can't be read .*Download")
attack("256 GB of holes", made(_holes), "lora.safetensors: claims 27487790\\d+ bytes, of which the disk holds")
attack("a name of 300 letters", lambda place: "n" * 300 + ".safetensors", "n: can't be read .*too long.*|too long")
attack("a name that drives the terminal", lambda place: "\x1b[2Jx.safetensors", r"\\x1b\[2Jx.safetensors: no such file")
attack("a pipe in the place of a .pt", made(os.mkfifo, "lora.pt"), "lora.pt: " + REGULAR)
attack("a pipe in the place of a GGUF file", made(os.mkfifo, "lora.gguf"), "lora.gguf: " + REGULAR)


def _within(place: Path) -> str:
    (place / "file").write_bytes(b"x")
    return "file/lora.safetensors"


def _odd_bytes(place: Path) -> str:
    name = os.fsdecode(b"\xff\xfe.safetensors")
    (place / name).write_bytes(save(good()))
    return name


attack("a name that is not UTF-8", _odd_bytes, r"\\udcff\\udcfe.safetensors: .*", verbs=("convert",))


def _linked_sidecar(place: Path) -> str:
    opened = folder({})(place)
    (place / "secret").write_text("the user's private key")
    (place / opened / "README.md").symlink_to(place / "secret")
    (place / opened / "tokenizer.json").symlink_to("/etc/hostname")
    return opened


attack("links beside the weights", _linked_sidecar, verbs=(), fine=("inspect", "check", "port"))

# --- bases ------------------------------------------------------------------------------------------------------------
WEIGHTS = {f"{MODULE}.weight": numbers(8, 8)}
INDEX = "base/model.safetensors.index.json"


def index(content: object, text: str | None = None) -> Build:
    def build(place: Path) -> str:
        (place / "base").mkdir()
        save_file(WEIGHTS, place / "base" / "one.safetensors")
        save_file(WEIGHTS, place / "outside.safetensors")
        (place / INDEX).write_text(json.dumps(content) if text is None else text)
        return "base"

    return build


def to(shard: object) -> Build:
    return index({"weight_map": {f"{MODULE}.weight": shard}})


def base_folder(config: str, name: str = "config.json") -> Build:
    def build(place: Path) -> str:
        (place / "base").mkdir()
        save_file(WEIGHTS, place / "base" / "model.safetensors")
        (place / "base" / name).write_text(config)
        return "base"

    return build


def linked(name: str, target: str) -> Build:
    def build(place: Path) -> str:
        to("one.safetensors")(place)
        (place / "base" / name).unlink()
        (place / "base" / name).symlink_to(target)
        return "base"

    return build


OUT = "names a shard outside of its folder"
for _name, _build, _says in (
    ("a base in an empty folder", made(Path.mkdir, "base"), "base: this folder holds no model weights. Expected"),
    ("a base that is text", content(b"hello", "base.txt"), "base.txt: is no checkpoint. Give"),
    ("a base that is a pipe", made(os.mkfifo, "base.safetensors"), "base.safetensors: .*(pipe|no checkpoint)"),
    (
        "a base that is a device",
        made(lambda path: path.symlink_to("/dev/zero"), "base.safetensors"),
        "base.safetensors: ",
    ),
    ("a base in a circle of links", made(_loop, "base.safetensors"), "base.safetensors: (no such file|can't be read)"),
    ("a base without tensors", content(save({}), "base.safetensors"), "base.safetensors: holds no tensors. Is it"),
    ("a shard above its folder", to("../outside.safetensors"), OUT),
    ("a shard at an absolute path", to("/etc/passwd"), OUT),
    ("a shard in a folder below", to("sub/one.safetensors"), OUT),
    ("a shard that is the folder above", to(".."), "(outside of its folder|is a folder|is a link)"),
    ("a shard that is its folder", to("."), "(outside of its folder|is a folder)"),
    ("a shard without a name", to(""), "(outside of its folder|is a folder)"),
    ("a shard that is a number", to(3), "3: no such file"),
    ("a shard that is null", to(None), "None: no such file"),
    ("a shard that is a list", to(["one.safetensors"]), "no such file|outside of its folder"),
    ("a shard with a zero byte", to("a\0b.safetensors"), r"a\\x00b.safetensors"),
    ("a shard that is a lone surrogate", to("\ud800"), r"\\ud800"),
    ("a shard that drives the terminal", to("\x1b[2J.safetensors"), r"\\x1b\[2J.safetensors: no such file"),
    ("a shard that is not there", to("two.safetensors"), "two.safetensors: no such file. Check"),
    ("a shard that is the index", to("model.safetensors.index.json"), "index.json: "),
    (
        "a shard that lacks the tensor",
        index({"weight_map": {"x": "one.safetensors"}}),
        "x: the index names a tensor that is not",
    ),
    ("an index that is a list", index([]), "index.json: is not a JSON object. Get"),
    ("an index without a map", index({"metadata": {}}), "weight_map: is missing, or no table"),
    ("a map that is a list", index({"weight_map": ["one.safetensors"]}), "weight_map: is missing, or no table"),
    ("an index that names nothing", index({"weight_map": {}}), "base"),
    ("an index that is no JSON", index(0, "{"), "index.json: can't be read as JSON"),
    ("an index 100,000 deep", index(0, "[" * 100_000), "index.json: is JSON too deep"),
    ("an index that names a tensor twice", index(0, '{"weight_map": {"a": "x", "a": "y"}}'), "a: is there twice"),
    (
        "an index that is a link to the password file",
        linked("model.safetensors.index.json", "/etc/passwd"),
        "is a link that leaves",
    ),
    (
        "a shard that is a link away",
        linked("one.safetensors", "../outside.safetensors"),
        "is a link that leaves its folder",
    ),
    ("a shard that is a link to a device", linked("one.safetensors", "/dev/zero"), "is a link that leaves its folder"),
    ("a base's config that is a list", base_folder("[1]"), "config.json: is not a JSON object. Get"),
    ("a base's config that is no JSON", base_folder("{"), "config.json: can't be read as JSON"),
    ("a base's config 100,000 deep", base_folder('{"a":' * 100_000), "config.json: is JSON too deep"),
    ("a base's config with a key twice", base_folder('{"a": 1, "a": 2}'), "config.json: a: is there twice"),
):
    attack(_name, _build, _says, verbs=("check", "port"), role="base")

for _name, _config in (
    ("a base's config of odd values", '{"model_type": ["x"], "_class_name": 3, "quantization_config": null}'),
    ("a base's config that drives the terminal", '{"model_type": "\\u001b[2J", "architectures": "x"}'),
):
    attack(_name, base_folder(_config), verbs=(), fine=("check",), role="base")

_NAN = numbers(8, 8)
_NAN[2, 2] = float("nan")
attack(
    "NaN in a base",
    only({f"{MODULE}.weight": _NAN}),
    f"{MODULE}.weight: holds NaN or Inf",
    verbs=("port",),
    role="base",
)
attack(
    "a base of integers",
    only({f"{MODULE}.weight": torch.ones(8, 8, dtype=torch.int64)}),
    "lora.safetensors: the weights have nothing to do with each other",
    verbs=("port",),
    role="base",
    code=3,
)
attack(
    "a base of vectors", only({f"{MODULE}.weight": torch.ones(8)}), "base|lora", verbs=("port",), role="base", code=3
)
attack(
    "an adapter as a base",
    only({PEFT_UP: numbers(8, 2), PEFT_DOWN: numbers(2, 8)}),
    "base",
    verbs=("port",),
    role="base",
    code=3,
)


# --- GGUF -------------------------------------------------------------------------------------------------------------
def gguf(tensors: int, pairs: int, body: bytes = b"", version: int = 3) -> Build:
    return content(b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body, "base.gguf")


def info(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", dim) for dim in dims)
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


PAD = bytes(4096)
for _name, _build in (
    ("GGUF that ends behind its magic", content(b"GGUF", "base.gguf")),
    ("GGUF with another magic", content(b"GGML" + PAD, "base.gguf")),
    ("GGUF of version 1", gguf(0, 0, version=1)),
    ("GGUF of version 99", gguf(0, 0, PAD, version=99)),
    ("GGUF of the other byte order", content(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "base.gguf")),
    ("GGUF of 2^60 tensors", gguf(1 << 60, 0, PAD)),
    ("GGUF of 2^60 pairs", gguf(0, 1 << 60, PAD)),
    ("GGUF of no tensors", gguf(0, 0, PAD)),
    ("GGUF with a name of 2^60 bytes", gguf(1, 0, struct.pack("<Q", 1 << 60) + PAD)),
    ("GGUF with a string of 2^40 bytes", gguf(1, 1, pair(b"a", 8, struct.pack("<Q", 1 << 40)) + PAD)),
    ("GGUF with an array of 2^60 bytes", gguf(1, 1, pair(b"a", 9, struct.pack("<IQ", 0, 1 << 60)) + PAD)),
    ("GGUF with arrays within arrays", gguf(1, 1, pair(b"a", 9, struct.pack("<IQ", 9, 1) * 200) + PAD)),
    ("GGUF with a value of no known type", gguf(1, 1, pair(b"a", 77, PAD))),
    (
        "GGUF of 4,000,000,000 dimensions",
        gguf(1, 0, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 4_000_000_000) + PAD),
    ),
    ("GGUF of 2^62 columns", gguf(1, 0, info(b"a.weight", [1 << 62]) + PAD)),
    ("GGUF whose product overflows", gguf(1, 0, info(b"a.weight", [1 << 32, 1 << 32]) + PAD)),
    ("GGUF of an unknown type", gguf(1, 0, info(b"a.weight", [32], kind=999) + PAD)),
    ("GGUF of half a block", gguf(1, 0, info(b"a.weight", [33], kind=2) + PAD)),
    ("GGUF beyond its end", gguf(1, 0, info(b"a.weight", [32], offset=1 << 40) + PAD)),
    ("GGUF with a name twice", gguf(2, 0, info(b"a.weight", [8]) * 2 + PAD)),
    (
        "GGUF with tensors in the same bytes",
        gguf(200, 0, b"".join(info(b"a%d.weight" % i, [512]) for i in range(200)) + PAD),
    ),
    ("GGUF with an alignment of 0", gguf(1, 1, pair(b"general.alignment", 4, bytes(4)) + info(b"a", [8]) + PAD)),
    ("GGUF with an alignment of 3", gguf(1, 1, pair(b"general.alignment", 4, b"\3\0\0\0") + info(b"a", [8]) + PAD)),
    (
        "GGUF with an alignment in words",
        gguf(1, 1, pair(b"general.alignment", 8, struct.pack("<Q", 1) + b"x") + info(b"a", [8]) + PAD),
    ),
    ("GGUF with a name that is not UTF-8", gguf(1, 0, info(b"\xff\xfe", [8]) + PAD)),
):
    attack(_name, _build, "base.gguf: ", verbs=("check", "port"), role="base")
