"""Broken inputs out of good ones, the same for the same dice: bytes, JSON, safetensors headers, zip archives."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from math import prod
from typing import Any

#: One input out of another.
Mutator = Callable[[bytes, random.Random], bytes]

INTERESTING = (0, 1, 2, 7, 8, 127, 128, 255, 256, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, 1 << 63)
# What no reader expects in the place of what it expects.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 1 << 31, 1 << 63, -(1 << 63), 10**400, 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "0", "a", ".", "..", "../../x", "\x00", "\x1b[2J", "\ud800", "ⅷ", "\u202e", "x" * 2000),
    *("(a+)+$", "F32", "[]", "{}", "null", "NaN"),
    *([], [0], [-1], [[]], [None], {}, {"": 0}, {"a": {"b": []}}, ["F32"], [0, 1 << 62]),
)
DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "I64", "I8", "U8", "BOOL", "C64", "U16", "F4", "F32 ")
_SIZES = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "F16": 2, "BF16": 2, "U16": 2}
_MOST = 1 << 16


def of_bytes(data: bytes, dice: random.Random) -> bytes:
    """Bits turned, bytes changed, parts cut out, doubled, moved or put in."""
    out = bytearray(data or b"\0")
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        at, to = sorted((dice.randrange(len(out) + 1), dice.randrange(len(out) + 1)))
        kind = dice.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << dice.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = dice.randrange(256)
        elif kind == 2:
            del out[at : min(to, at + dice.choice((1, 4, 8, 1000)))]
        elif kind == 3:
            out[at:at] = out[at : min(to, at + 200)]
        elif kind == 4:
            size = dice.choice((1, 2, 4, 8))
            number = dice.choice(INTERESTING) & ((1 << 8 * size) - 1)
            out[at : at + size] = number.to_bytes(size, dice.choice(("little", "big")))
        elif kind == 5:
            del out[at:]
        else:
            out[at:at] = dice.randbytes(dice.randrange(1, 9))
        if not out:
            out = bytearray(b"\0")
    return bytes(out[:_MOST])


def of_json(value: Any, dice: random.Random) -> Any:
    """The same JSON with one or several places changed."""
    for _ in range(dice.choice((1, 1, 2, 3, 6))):
        value = _changed(value, dice, depth=0)
    return value


def _changed(value: Any, dice: random.Random, depth: int) -> Any:
    if isinstance(value, dict) and value and (depth == 0 or dice.random() < 0.8):
        return _changed_table(dict(value), dice, depth)
    if isinstance(value, list) and value and dice.random() < 0.8:
        out = list(value)
        at = dice.randrange(len(out))
        kind = dice.randrange(4)
        if kind == 0:
            out[at] = _changed(out[at], dice, depth + 1)
        elif kind == 1:
            del out[at]
        elif kind == 2:
            out.insert(at, dice.choice((out[at], dice.choice(ODD))))
        else:
            out[at] = dice.choice(ODD)
        return out
    if isinstance(value, str) and dice.random() < 0.5:
        return of_text(value, dice)
    if isinstance(value, int) and not isinstance(value, bool) and dice.random() < 0.5:
        return dice.choice((value + 1, value - 1, -value, value * 2, value << 40, dice.choice(INTERESTING)))
    return dice.choice(ODD)


def _changed_table(out: dict[str, Any], dice: random.Random, depth: int) -> dict[str, Any]:
    name = dice.choice(list(out))
    kind = dice.randrange(8)
    if kind < 4:
        out[name] = _changed(out[name], dice, depth + 1)
    elif kind == 4:
        del out[name]
    elif kind == 5:
        out[of_text(name, dice)] = out.pop(name)
    elif kind == 6:
        out[of_text(name, dice)] = out[name]
    else:
        other = dice.choice(list(out))
        out[name], out[other] = out[other], out[name]
    return out


def of_text(text: str, dice: random.Random) -> str:
    """A name with parts cut, doubled, swapped, or replaced."""
    mark = dice.choice((".", "_", ":", "/", ""))
    parts = text.split(mark) if mark else list(text)
    if not parts:
        return str(dice.choice(("a", "\x00", "é")))
    at, to = dice.randrange(len(parts)), dice.randrange(len(parts))
    kind = dice.randrange(6)
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts.insert(at, parts[to])
    elif kind == 2:
        parts[at], parts[to] = parts[to], parts[at]
    elif kind == 3:
        parts[at] = str(
            dice.choice(("", "0", "1", "99999999999999999999", "weight", "alpha", "..", "é", "\u202e", "\x1b"))
        )
    elif kind == 4:
        parts = parts[:at]
    else:
        parts[at] = parts[at].swapcase()
    return mark.join(parts)


def json_bytes(data: bytes, dice: random.Random) -> bytes:
    """A JSON file changed as JSON, or as bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return of_bytes(data, dice)
    if dice.random() < 0.1:
        return of_bytes(data, dice)
    return json.dumps(of_json(value, dice)).encode("utf-8", "surrogatepass")[:_MOST]


def split(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Header and data of a safetensors file, or None."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        return None
    return (header, data[8 + size :]) if isinstance(header, dict) else None


def joined(header: dict[str, Any], body: bytes) -> bytes:
    """A safetensors file of these parts, as they are."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def repaired(header: dict[str, Any]) -> bytes:
    """A file that passes safetensors' own checks as far as it can: entries that are none go, offsets follow shapes."""
    out: dict[str, Any] = {}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            if isinstance(entry, dict):
                out[name] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in entry.items()}
            continue
        if not isinstance(entry, dict) or "\ud800" in name:
            continue
        shape = entry.get("shape")
        sizes = shape if isinstance(shape, list) else [1]
        sizes = [n if type(n) is int and 0 <= n <= 64 else 2 for n in sizes][:6]
        dtype = entry.get("dtype") if entry.get("dtype") in DTYPES[:-1] else "F32"
        size = prod(sizes) * _SIZES.get(str(dtype), 1)
        if dtype == "F4" or end + size > _MOST:
            continue
        out[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [end, end + size]}
        end += size
    # Ones of bfloat16, small numbers in the other dtypes.
    return joined(out, (b"\x80\x3f" * (end // 2 + 1))[:end])


def safetensors(data: bytes, dice: random.Random) -> bytes:
    """A safetensors file changed in its header's JSON (mostly so that it is still one), or as bytes."""
    parts = split(data)
    if parts is None or dice.random() < 0.05:
        return of_bytes(data, dice)
    header, body = parts
    changed = of_json(header, dice)
    if not isinstance(changed, dict):
        return of_bytes(data, dice)
    for entry in changed.values():
        if isinstance(entry, dict) and "dtype" in entry and dice.random() < 0.05:
            entry["dtype"] = dice.choice(DTYPES)
    if dice.random() < 0.15:
        return joined(changed, body)[:_MOST]
    metadata = changed.get("__metadata__")
    if isinstance(metadata, dict):
        changed["__metadata__"] = {name: _json_within(value, dice) for name, value in metadata.items()}
    return repaired(changed)


def _json_within(value: Any, dice: random.Random) -> Any:
    """A metadata value; JSON in it is changed as JSON."""
    if not isinstance(value, str) or value[:1] not in ("{", "[") or dice.random() < 0.5:
        return value
    return json_bytes(value.encode("utf-8", "surrogatepass"), dice).decode("utf-8", "replace")


def archive(data: bytes, dice: random.Random) -> bytes:
    """A zip archive changed within its entries (with true sums), or as bytes."""
    if dice.random() < 0.3:
        return of_bytes(data, dice)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            entries = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    except Exception:
        return of_bytes(data, dice)
    if not entries:
        return of_bytes(data, dice)
    at = next((i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl")), 0)
    at = at if dice.random() < 0.8 else dice.randrange(len(entries))
    kind = dice.randrange(8)
    name, content = entries[at]
    if kind == 0:
        del entries[at]
    elif kind == 1:
        entries[at] = (of_text(name, dice), content)
    else:
        entries[at] = (name, of_bytes(content, dice))
    out = io.BytesIO()
    packing = zipfile.ZIP_DEFLATED if dice.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", packing) as new:
        for name, content in entries:
            new.writestr(zipfile.ZipInfo(name), content, packing)
    return out.getvalue()[: _MOST * 2]
