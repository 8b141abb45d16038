"""Writes ``docs/methods.md`` from the registry: ``python -m tools.make_docs``."""

from __future__ import annotations

import inspect
from pathlib import Path

from regraft.cli.methods import NEEDS
from regraft.cli.port import port
from regraft.methods import Method, methods

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"

HEAD = """# Methods

Made from the registry by `python -m tools.make_docs`; `regraft methods` prints the same table. What each of them kept
when it was measured stands in [measured.md](measured.md), beside the controls: no adapter, a plain copy, a random
update of the same norm, and an adapter trained natively on the new base.

A **copy is the baseline**: between bases of one size no map of weights has beaten it yet; what has runs both models,
and `auto` takes it where held-out inputs say so ([benchmark.md](benchmark.md)). A method whose scope is *pair* is
fitted once for two bases and can be saved as a migration (`port --save-migration`); one whose scope is *adapter*
depends on the adapter. Ports in which updates meet on one module, or are copied to several, have no migration file.

| method | needs | scope | another size | what it does | source |
|---|---|---|---|---|---|
"""


def row(method: Method) -> str:
    needs = " + ".join(NEEDS[need] for need in method.needs) or "shapes only"
    resizes = "yes" if method.resizes else "no"
    cells = (f"`{method.name}`", needs, method.scope, resizes, method.summary, method.reference)
    return f"| {' | '.join(cells)} |"


def flag(option: str) -> str:
    if option in inspect.signature(port).parameters:
        return f"`--{option.replace('_', '-')}`"
    return f"`{option}=`, from Python alone"


def section(method: Method) -> str:
    options = "".join(
        f"- {flag(name)}: default {'the method’s own' if default is None else default}\n"
        for name, default in method.options.items()
    )
    rule = inspect.getdoc(method.function) or ""
    return f"## {method.name}\n\n```text\n{rule}\n```\n" + (f"\n{options}" if options else "")


def page() -> str:
    found = list(methods().values())
    table = "\n".join(row(method) for method in found)
    return f"{HEAD}{table}\n\n" + "\n".join(section(method) for method in found)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
