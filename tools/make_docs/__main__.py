"""Writes ``docs/methods.md`` from the registry: ``python -m tools.make_docs``."""

from __future__ import annotations

import inspect
from pathlib import Path

from regraft.cli.methods import NEEDS
from regraft.cli.port import port
from regraft.methods import Method, methods

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
MEASURED = PAGE.with_name("benchmark.md")
#: Kinds of pair of the benchmark that the table here repeats, by how their columns begin.
KINDS = (
    "LM: near",
    "LM: strong",
    "LM: far",
    "diffusion: near",
    "diffusion: strong",
    "diffusion: far",
    "encoders: near",
)

HEAD = """# Methods

Made from the registry by `python -m tools.make_docs`; `regraft methods` prints the first table. What each of them kept
when it was measured stands [below](#measured), and on real pairs in [measured.md](measured.md), beside the controls: no
adapter, a plain copy, a random update of the same norm, and an adapter trained natively on the new base.

A **copy is the baseline**: between bases of one size no map of weights has beaten it in the mean over a kind of pair;
what has runs both models, and `auto` takes it where held-out inputs say so ([benchmark.md](benchmark.md)). A method
whose scope is *pair* is fitted once for two bases and can be saved as a migration (`port --save-migration`); one whose
scope is *adapter* depends on the adapter. Ports in which updates meet on one module, or are copied to several, have no
migration file.

| method | needs | scope | another size | what it does | source |
|---|---|---|---|---|---|
"""

BELOW = """## Measured

Share of a native adapter's gain on the new base, by kind of pair: 0 is the new base alone, 1 an adapter trained anew on
it. With default options, out of [the benchmark](benchmark.md#methods-by-kind-of-pair), which has other kinds and the
intervals. ▲ beats the copy and ▼ loses to it on the same inputs; (in brackets) `port` refuses it, and it was forced;
× could not be carried; (6 of 9) over those adapters alone that it could be measured on; – was not measured there.
*random*: an update of the same norm.

"""


def row(method: Method) -> str:
    needs = " + ".join(NEEDS[need] for need in method.needs) or "shapes only"
    resizes = "yes" if method.resizes else "no"
    told = (f"`{method.name}`", needs, method.scope, resizes, method.summary, method.reference)
    return f"| {' | '.join(told)} |"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def measured(found: list[Method]) -> str:
    """The benchmark's own figures of each method, as its page has them."""
    text = MEASURED.read_text(encoding="utf-8")
    head, _, *rows = (cells(line) for line in text[text.index("| method |") :].split("\n\n")[0].splitlines())
    places = [next(i for i, title in enumerate(head) if title.startswith(kind)) for kind in KINDS]
    figures = {name: [line[i] for i in places] for name, *line in ((row[0], *row) for row in rows)}
    shown = {"*random*": figures["random"]}
    shown |= {f"`{method.name}`": figures.get(method.name, ["–"] * len(places)) for method in found}
    lines = [("method", *(head[i] for i in places)), ("---", *("---:" for _ in places))]
    lines += [(name, *row) for name, row in shown.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    return f"{HEAD}{table}\n\n{BELOW}{measured(found)}\n\n" + "\n".join(section(method) for method in found)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
