"""The record as tables: for the terminal, the README and the page of the benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from regraft.bench.controls import CONTROLS
from regraft.bench.goals import Goal, goals
from regraft.bench.results import WORLDS
from regraft.report.bench_schema import BenchGroup, BenchPair, BenchReport, BenchRow
from regraft.report.schema import Interval

#: Where a page's generated part begins and ends.
BEGIN, END = "<!-- benchmark: written by `regraft bench table` -->", "<!-- /benchmark -->"

_HEADS = {
    "language models": "LM",
    "diffusion": "diffusion",
    "real encoders": "encoders",
}
_IN_FULL = {"LM": "language models", "encoders": "sentence and protein encoders", "diffusion": "text to image"}
#: What a goal's word says of the new base.
_KINDS = {
    "near": "the base was trained on a little",
    "strong": "it was trained on until its weights moved far",
    "pruned": "blocks were taken out of it",
    "grown": "it was made wider or deeper",
    "far": "another base, trained apart",
}
#: Known without measuring: left out where room is short.
_TRIVIAL = ("none", "empty")


def mark(row: BenchRow) -> str:
    """Whether a row loses to the copy or beats it, as one sign."""
    low, high = row.versus_copy.low, row.versus_copy.high
    if row.name in CONTROLS or low is None or high is None:
        return ""
    return " ▼" if high < 0 else " ▲" if low > 0 else ""


def recovery(row: BenchRow) -> str:
    """A row's recovery as tables show it."""
    if row.recovery.mean is None:
        return "×" if row.missing else "–"
    figure = f"{_signed(row.recovery.mean)}{mark(row)}"
    return (f"({figure})" if row.refused else figure) + some_of(row)


def some_of(row: BenchRow) -> str:
    """How many adapters a mean rests on, where it isn't all: it can't be held against one over the others."""
    reason = row.recovery.reason or ""
    if not reason.startswith("defined on "):
        return ""
    return f" ({reason.removeprefix('defined on ').removesuffix(' adapters')})"


def legend(record: BenchReport) -> str:
    """What is said under each table."""
    seeds = [len(adapter.seeds) for pair in record.pairs for adapter in pair.adapters]
    text = (
        "Recovery: share of a native adapter's gain, signed; 0 is the new base alone, 1 the native adapter. "
        "▼ loses to the copy and ▲ beats it, each with the whole 95 % interval of the difference on the same inputs; "
        "where nothing could be copied, it is held against the new base alone. "
        "(In brackets) `port` refuses this; what is shown was forced. × could not be carried at all."
    )
    if any(some_of(row) for group in record.groups for row in group.rows):
        text += " (4 of 8): the mean over those adapters alone that it could be measured on."
    if 1 in seeds:
        where = "Each adapter was trained with one seed" if set(seeds) == {1} else "Where adapters have one seed"
        text += f" {where}: intervals and marks rest on the inputs alone, and don't tell what another training brings."
    return text


def _signed(value: float, digits: int = 2) -> str:
    # A minus of its own: the hyphen is too short beside figures.
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def figure(value: Interval | None, digits: int = 2) -> str:
    """A mean as tables show it."""
    return "–" if value is None or value.mean is None else _signed(value.mean, digits)


def spread(value: Interval) -> str:
    """A mean with its interval."""
    if value.mean is None or value.low is None or value.high is None:
        return "–"
    return f"{_signed(value.mean, 3)} [{_signed(value.low)}, {_signed(value.high)}]"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def rows_of(record: BenchReport) -> list[str]:
    """Names of all rows, in order."""
    return list(dict.fromkeys(row.name for group in record.groups for row in group.rows))


def _world(group: BenchGroup) -> str:
    """A group's world in a word."""
    return _HEADS.get(WORLDS.get(group.world, ""), group.world)


def summary(record: BenchReport, without: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of methods by groups of pairs, some rows left out."""
    head = ["method"]
    for group in record.groups:
        many = f", {len(group.pairs)} pairs" if len(group.pairs) > 1 else ""
        head.append(f"{_world(group)}: {group.expects}{many}")
    lines = []
    for name in (name for name in rows_of(record) if name not in without):
        cells = [next((row for row in group.rows if row.name == name), None) for group in record.groups]
        lines.append([name, *("" if row is None else recovery(row) for row in cells)])
    return head, lines


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; figures to the right."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made(record: BenchReport) -> list[str]:
    """Of each run: its pairs, where there are several runs, its date, versions and hours."""
    told = []
    for run in record.runs:
        versions = ", ".join(f"{name} {number}" for name, number in run.versions.items())
        hours = f"{run.seconds / 3600:.1f} h of processor time for ports and their scores, all else left out"
        which = f"{', '.join(run.pairs)}: " if len(record.runs) > 1 else ""
        told.append(f"{which}{run.date}; {versions}; one thread a process; {hours}.")
    return told


def block(record: BenchReport) -> str:
    """The summary for a page of other text, such as the README, whose readers bring a LoRA."""
    return "\n\n".join(_told(record, _TRIVIAL))


def _told(record: BenchReport, without: Sequence[str] = ()) -> tuple[str, ...]:
    """The summary and what it takes to read it."""
    return markdown(*summary(record, without)), _for_makers(record), legend(record), *runs_of(record)


def runs_of(record: BenchReport) -> list[str]:
    """Each run's command, with what `made` says of it."""
    return [f"```\n{run.command}\n```\n\n{when}" for run, when in zip(record.runs, made(record), strict=True)]


def _for_makers(record: BenchReport) -> str:
    """The table in words for who has a LoRA, and not read of the benchmark."""
    worlds = [_world(group) for group in record.groups]
    kinds = [group.expects for group in record.groups]
    words = [f"*{name}*: {_IN_FULL[name]}" for name in dict.fromkeys(worlds) if name in _IN_FULL]
    words += [f"*{name}*: {_KINDS[name]}" for name in dict.fromkeys(kinds) if name in _KINDS]
    words += [f"*{name}*: {CONTROLS[name]}" for name in ("reverted", "native") if name in rows_of(record)]
    return f"0 = as without a LoRA, 1 = as a LoRA trained anew on the new base. {'; '.join(words)}."


def replaced(text: str, begin: str, end: str, made: str) -> str:
    """A text with what stands between two marks replaced; as it is where it lacks one of them."""
    if begin not in text or end not in text:
        return text
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def page(record: BenchReport) -> str:
    """docs/benchmark.md, whole."""
    parts = [
        "# The benchmark",
        "Made by `regraft bench table results/bench.json --markdown docs/benchmark.md`. Each adapter was trained on "
        "the old base and ported to the new one by every method; the same adapter was trained on the new base with the "
        "same budget (*native*). Test inputs that nothing was trained on are scored under each of them.",
        _meanings(),
        "## Methods by kind of pair",
        *_told(record),
        "## Goals",
        goal_table(goals(record)),
        "## Pair by pair",
        *(part for pair in record.pairs for part in pair_part(pair)),
    ]
    return "\n\n".join(parts) + "\n"


def _meanings() -> str:
    lines = [f"- *{name}*: {what}." for name, what in CONTROLS.items() if name != "old"]
    figures = [
        "- **Recovery**: (score(ported) − score(none)) / (score(native) − score(none)) on the new base. Over several "
        "adapters, the mean of their recoveries, each adapter counting alike. Intervals: bootstrap over inputs and "
        "seeds, 95 %; over inputs alone where there is one seed.",
        "- **Share of the teacher**: (score(ported) − score(none)) / (score(old base + LoRA) − score(none)).",
        "- **Retention**: of what the new base does better than the old one without any adapter, the share that is "
        "left under the ported one. It falls below 0 where the adapter costs more there than the upgrade brought, as "
        "the native one may too: hold it against the native's. A dash where the new base is not better there.",
        "- **Effect cosine and norm ratio**: as `regraft verify` measures them, on inputs that the bases make.",
        "- **Style, judge, concept** (diffusion): of sampled pictures, the share of pixels on the style's palette, and "
        "of pictures whose style and whose subject a small classifier recognises; on drawings that it was not trained "
        "on, it is right about the subject in 99.7 % or more, about the style in 99.9 % (`results/judge.json`, with "
        "the command). **Accuracy**, **correlation** (encoders): of the head's answers; of the property with what is "
        "read from the vectors.",
        "- **Energy kept**: ‖ΔW ported‖² / ‖ΔW‖². A diagnostic: it says nothing of what survived.",
        "- **Seconds, MB**: processor time of the port, and the memory that it added at its peak, on one thread.",
    ]
    return "Controls:\n\n" + "\n".join(lines) + "\n\nFigures:\n\n" + "\n".join(figures)


def goal_table(found: Sequence[Goal]) -> str:
    """Claims, whether each holds, and what that rests on."""
    said = {True: "holds", False: "**does not hold**", None: "not measured"}
    # A minus of its own, as in the other tables.
    figures = [re.sub(r"(?<![\w.])-(?=\d)", "−", goal.figures) or "–" for goal in found]
    return markdown(
        ("claim", "", "figures"),
        [(goal.claim, said[goal.held], text) for goal, text in zip(found, figures, strict=True)],
    ).replace("---:", "---")


def pair_part(pair: BenchPair) -> Iterator[str]:
    """A pair's own part of a page."""
    yield f"### {pair.name}"
    checks = [f"{adapter.name} {adapter.check.verdict or 'not judged'}" for adapter in pair.adapters]
    seeds = sorted({seed for adapter in pair.adapters for seed in adapter.seeds})
    yield (
        f"{pair.about}. Adapters: {', '.join(adapter.name for adapter in pair.adapters)}; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}. `regraft check`: {', '.join(checks)}."
    )
    head = ["method", "recovery", "less the copy's", "share of the teacher", "retention", "effect cosine", "norm ratio"]
    extra = list(dict.fromkeys(name for row in pair.rows for name in row.extra))
    yield markdown([*head, *extra, "energy kept", "seconds", "MB"], [_line(row, extra) for row in pair.rows])
    errors = {row.name: errors_of(pair, row) for row in pair.rows if row.errors}
    if errors:
        yield "\n".join(f"- {name}: {'; '.join(texts)}" for name, texts in errors.items())


def errors_of(pair: BenchPair, row: BenchRow) -> Iterator[str]:
    """A row's errors, each with the adapters that it came up on, unless it was all of them."""
    for text in row.errors:
        names = [a.name for a in pair.adapters if any(text in r.errors for r in a.rows if r.name == row.name)]
        yield text if len(names) == len(pair.adapters) else f"{text} ({', '.join(names)})"


def _line(row: BenchRow, extra: Sequence[str]) -> list[str]:
    name = f"({row.name})" if row.refused else row.name
    chosen = f" → {row.used}" if row.used and row.used != row.name.split()[0] else ""
    if row.missing:
        return [name, "×", *["–"] * (8 + len(extra))]
    return [
        f"{name}{chosen}",
        f"{spread(row.recovery)}{mark(row)}{some_of(row)}",
        figure(row.versus_copy, 3),
        figure(row.teacher_share),
        figure(row.retention),
        figure(row.effect_cosine),
        figure(row.effect_norm_ratio),
        *(_number(row.extra.get(name), 2) for name in extra),
        _number(row.energy_kept, 2),
        _number(row.seconds, 1),
        _number(row.peak_mb, 0),
    ]


def print_table(record: BenchReport, console: Console) -> None:
    """The summary in a terminal."""
    head, rows = summary(record)
    table = Table(box=None, pad_edge=False)
    table.add_column(head[0], no_wrap=True)
    for name in head[1:]:
        table.add_column(name, justify="right")
    for line in rows:
        table.add_row(*line)
    console.print(table)
    console.print()
    console.print(legend(record), markup=False)
    if record.missing:
        console.print(f"{record.missing} cells are missing; --resume makes them.", markup=False)


@dataclass(frozen=True)
class Written:
    """A record in Markdown, in one of the forms that records have.

    Attributes:
        begin: mark before the part of a page that is made of it.
        end: mark behind it.
        is_of: whether a record is of this form.
        block: that part.
        page: a page of its own.
    """

    begin: str
    end: str
    is_of: Callable[[BenchReport], bool]
    block: Callable[[BenchReport], str]
    page: Callable[[BenchReport], str]

    def __call__(self, text: str, record: BenchReport) -> str:
        """A page with its part made anew; the record's own page where it has none."""
        return replaced(text, self.begin, self.end, self.block(record)) if self.begin in text else self.page(record)


#: Of any record.
WRITTEN = Written(BEGIN, END, lambda record: True, block, page)
