"""Which code a method is: a digest of its source, so that a changed method's cells are made anew and no others are."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from regraft._version import __version__
from regraft.bench.variants import BY_INDEX, LOGITS, REFINE
from regraft.methods import get_method

_METHODS = "regraft.methods"


@cache
def source_of(name: str) -> str:
    """Digest of a method's module and of what it imports beyond what `copy` imports; of `auto`, of every method's.

    `refine` is `regraft.refine` with all that `auto` is, which it starts from.

    What copy imports carries every port: `regraft.bench.cells.VERSION` tells when that changes a figure.
    """
    common = _common()
    # `auto` finds the others in the registry.
    others = {
        "auto": _METHODS,
        REFINE: "regraft.refine",
        BY_INDEX: "regraft.bench.by_index",
        LOGITS: "regraft.bench.bridged",
    }
    start = others.get(name) or get_method(name).function.__module__
    mine = _all_methods() if name in ("auto", REFINE) else frozenset[str]()
    mine |= frozenset() if name == "auto" else _closure(start)
    return _digest((mine - common) | {start})


@cache
def source_of_check() -> str:
    """Digest of what `check` judges by, and of the figures that its forecast was fitted to."""
    modules = {"regraft.check", *(_closure("regraft.check") - _common())}
    folder = _folder("regraft.forecast")
    data = sorted(folder.glob("*.json")) if folder is not None and folder.name == "forecast" else []
    return _digest(modules, data)


def _common() -> frozenset[str]:
    return _closure(get_method("copy").function.__module__)


def _digest(modules: Iterable[str], data: Iterable[Path] = ()) -> str:
    found = hashlib.sha256(__version__.encode())
    for module in sorted(modules):
        file = _file(module)
        found.update(module.encode() + (_code(file) if file else b""))
    for file in data:
        found.update(file.read_bytes())
    return found.hexdigest()


def _code(file: Path) -> bytes:
    """What a module does: its syntax without comments and docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_text(one)]  # type: ignore[attr-defined]
    return ast.dump(tree).encode()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def _all_methods() -> frozenset[str]:
    folder = _folder(_METHODS)
    names = [f"{_METHODS}.{file.stem}" for file in folder.glob("*.py")] if folder else []
    return frozenset().union(*(_closure(name) for name in names))


@cache
def _closure(start: str) -> frozenset[str]:
    """A module and every module of regraft that it imports, directly or through others."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += _imports(module)
    return frozenset(seen)


@cache
def _imports(module: str) -> tuple[str, ...]:
    file = _file(module)
    return tuple(_named(ast.parse(file.read_text(encoding="utf-8")))) if file else ()


def _named(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("regraft"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("regraft"):
            assert node.module is not None
            yield node.module
            # A name may be a module of its own.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def _file(module: str) -> Path | None:
    parts = module.split(".")
    package = _folder("regraft")
    if package is None:
        return None
    place = package.joinpath(*parts[1:])
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return file
    return None


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None
