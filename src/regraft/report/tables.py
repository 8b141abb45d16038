"""The records in the terminal: the verdict first, what is left out and why, then blocks instead of 700 modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from regraft.report.depth import (
    CONTROLS,
    TIERS,
    Group,
    Module,
    after_word,
    component_of,
    effects,
    forecasts_of,
    further,
    groups,
    left_out,
    mean,
    number,
    percent,
    significant,
    total,
    whole_percent,
)
from regraft.report.refine_schema import RefineReport, verdict_of
from regraft.report.schema import (
    BaseSummary,
    CheckReport,
    Forecast,
    Interval,
    PortedModule,
    PortReport,
    VerifyReport,
)
from regraft.report.train_schema import TrainReport

#: Rows of the module table: what a person reads; ``--json`` has every module.
ROW_LIMIT = 24
_UNTRAINED_LIMIT = 8

_STYLE = {"survives": "bold green", "refine": "bold yellow", "refused": "bold red"}


def check_table(report: CheckReport, console: Console) -> None:
    """Print a forecast, or the plan of ``port --dry-run``."""
    word = {"survives": "SURVIVES", "refine": "NEEDS A REFINE", "refused": "REFUSED"}[report.verdict]
    _head(console, word, _STYLE[report.verdict], report.summary)
    counts = {s: sum(m.status == s for m in report.modules) for s in ("ported", "skipped", "refused")}
    note = f"; {escape(report.method_note)}" if report.method_note else ""
    rows = [
        ("adapter", escape(report.input)),
        ("from", _base(report.source)),
        ("to", _base(report.target)),
        ("advised", f"[bold]{report.tier}[/]: {TIERS[report.tier]}"),
        *([("method", f"[bold]{escape(report.method)}[/]{note}")] if report.tier != "bridge" else []),
        (
            "modules",
            _counts(counts, "to port", "to skip", total(m.share for m in report.modules if m.status == "skipped")),
        ),
        ("weights", _weights(report.similarity, report.distance)),
    ]
    rows += [(f"forecast {name}", _forecast(value)) for name, value in forecasts_of(report)]
    _facts(console, rows)
    _left_out(console, report.modules)
    _reasons(console, [*(f"warning: {line}" for line in report.warnings), *further(report.reasons, report.summary)])
    _modules(console, report.modules)


def port_table(report: PortReport, console: Console) -> None:
    """Print what a port did."""
    if report.forced:
        word, style = "FORCED", "bold yellow"
    elif report.verdict == "refused" or not report.counts.ported:
        word, style = "REFUSED" if report.verdict == "refused" else "NOTHING PORTED", "bold red"
    elif report.verdict == "refine":
        word, style = "PORTED, REFINE ADVISED", "bold yellow"
    else:
        word, style = "PORTED", "bold green"
    _head(console, word, style, report.summary)
    why = f" ({escape(report.method_reason)})" if report.method_reason else ""
    rows = [
        ("adapter", escape(report.input)),
        ("from", _base(report.source)),
        ("to", _base(report.target)),
        ("method", f"[bold]{escape(report.method)}[/]{why}"),
        ("modules", _counts(report.counts.model_dump(), "ported", "skipped", report.skipped_share)),
        ("written", escape(", ".join(report.outputs)) or "nothing"),
    ]
    rows += [("migration", escape(report.migration))] if report.migration else []
    rows += [("taken out", escape(", ".join(report.removed)))] if report.removed else []
    rows += [("took", f"{report.seconds:.1f} s, {report.peak_mb:.0f} MB at most")]
    _facts(console, rows)
    _left_out(console, report.modules)
    _reasons(console, further(report.reasons, report.summary))
    if report.unrecognised:
        _reasons(console, [f"not understood: {key}" for key in report.unrecognised[:5]])
    _modules(console, report.modules)


def verify_table(report: VerifyReport, console: Console) -> None:
    """Print a measurement beside its controls."""
    _head(console, "MEASURED", "bold cyan", report.summary)
    _facts(
        console,
        [
            ("original", f"{escape(report.original)} on {escape(report.source)}"),
            ("ported", f"{escape(report.ported)} on {escape(report.target)}"),
            ("model", escape(report.model_class)),
            ("inputs", f"{report.n_inputs}: {escape(report.inputs)}"),
        ],
    )
    beside = effects(report)
    with_kl = any(effect.kl for effect in beside.values())
    table = _table("", "effect cosine", "norm ratio", *(["KL"] if with_kl else []))
    for name, effect in beside.items():
        cells = [_interval(effect.effect_cosine), _interval(effect.effect_norm_ratio)]
        table.add_row(
            escape(CONTROLS.get(name, name)), *cells, *([_interval(effect.kl, significant)] if with_kl else [])
        )
    console.print(table)
    notes = dict.fromkeys(e.effect_cosine.reason for e in beside.values() if e.effect_cosine.mean is not None)
    _reasons(console, [note for note in notes if note])
    console.print("[dim]cosine 1: the same direction; ratio 1: as strong. 95 % intervals over inputs.[/]")


def refine_table(report: RefineReport, console: Console) -> None:
    """Print where a refine began, where it came to, and what it took."""
    word, tone = verdict_of(report)
    _head(console, word.upper(), {"good": "bold green", "warn": "bold yellow", "bad": "bold red"}[tone], report.summary)
    why = f" ({report.start_reason})" if report.start_reason else ""
    rows = [
        ("start", f"{report.start}{why}"),
        ("objective", f"{report.objective} ({report.objective_reason})"),
        *([("hidden", report.hidden)] if report.hidden else []),
        ("inputs", report.inputs),
        ("trained", f"{report.trained:,} numbers in {report.modules} modules"),
        *([("quantised", report.quantised)] if report.quantised else []),
        ("stopped", report.stopped),
        *([("not kept", f"the state to go on from: {report.unkept}")] if report.unkept else []),
        ("took", f"{report.seconds:.0f} s, {report.peak_mb:.0f} MB at most"),
        *(("written", output) for output in report.outputs),
    ]
    _facts(console, [(name, escape(value)) for name, value in rows])
    drift = any(row.drift is not None for row in report.beside)
    table = _table("on held-out inputs", "of what is wanted", *(["drift"] if drift else []))
    for row in report.beside:
        title = f"{row.title} ({row.note})" if row.note else row.title
        table.add_row(escape(title), f"{row.recovered:.1%}", *([number(row.drift)] if drift else []))
    console.print(table)
    if drift:
        console.print("[dim]drift: distance from what is wanted on the new base's own inputs[/]")
    for name, reason in list(report.untrained.items())[:_UNTRAINED_LIMIT]:
        console.print(f"[dim]not trained: {escape(name)}: {escape(reason)}[/]", soft_wrap=True)


def train_table(report: TrainReport, console: Console) -> None:
    """Print what was trained, on what, and how the loss went."""
    rows = [
        ("kind", f"{report.kind}, {report.trained:,} numbers in {report.modules} modules"),
        ("data", f"{report.learnt} {report.unit} from {report.data}, {report.batch} in a step"),
        ("base", f"{report.base.path} ({report.base.fingerprint})"),
        ("stopped", report.stopped),
        *([("not kept", f"the state to go on from: {report.unkept}")] if report.unkept else []),
        *(("note", note) for note in report.notes),
        ("took", f"{report.seconds:.0f} s, {report.peak_mb:.0f} MB at most"),
        *(("written", output) for output in report.outputs),
    ]
    _facts(console, [(name, escape(value)) for name, value in rows])
    held = any(look.held is not None for look in report.looks)
    table = _table("step", "loss", *(["on held-out data"] if held else []))
    for look in report.looks:
        loss = "" if look.loss is None else f"{look.loss:.4f}"
        table.add_row(str(look.step), loss, *(["" if look.held is None else f"{look.held:.4f}"] if held else []))
    console.print(table)


# ---- parts --------------------------------------------------------------------------------------------------------


def _head(console: Console, word: str, style: str, summary: str) -> None:
    console.print(f"[{style}]{word}[/]  {escape(after_word(summary, word))}")
    console.print()


def _facts(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def _base(base: BaseSummary | None) -> str:
    if base is None:
        return "not given"
    family = f"{base.family}, " if base.family else ""
    return f"{escape(base.path)} [dim]({escape(family)}{escape(base.fingerprint[:12])})[/]"


def _counts(counts: dict[str, int], ported: str, skipped: str, share: float | None) -> str:
    weight = f" ({percent(share)} of the update's norm)" if counts["skipped"] and share is not None else ""
    return f"[bold]{counts['ported']}[/] {ported}, {counts['skipped']} {skipped}{weight}, {counts['refused']} refused"


def _weights(similarity: float | None, distance: float | None) -> str:
    return f"similarity {number(similarity)} (1 equal, 0 unrelated), drift {number(distance)}"


def _forecast(value: Forecast) -> str:
    ends = f"{100 * value.low:.0f} to {whole_percent(value.high)}"
    return f"[bold]{whole_percent(value.recovery)}[/] of a native adapter's gain ({ends})"


def _interval(value: Interval | None, digits: Callable[[float | None], str] = number) -> str:
    if value is None or value.mean is None:
        return escape(f"– ({value.reason})") if value is not None and value.reason else "–"
    ends = f" ({digits(value.low)} to {digits(value.high)})" if value.low is not None and value.high is not None else ""
    return f"{digits(value.mean)}{ends}"


def _left_out(console: Console, modules: Sequence[Module]) -> None:
    rows = left_out(modules)
    if rows:
        console.print()
    for row in rows:
        style = "red" if row.status == "refused" else "yellow"
        weight = f", {percent(row.share)} of the norm" if row.share is not None else ""
        line = f"[{style}]{len(row.names)} {row.status}{weight}[/]: {escape(row.reason)} [dim]({escape(row.where)})[/]"
        console.print(Padding(line, (0, 0, 0, 2)))


def _reasons(console: Console, reasons: Sequence[str]) -> None:
    if reasons:
        console.print()
    for reason in reasons:
        console.print(Padding(f"- {escape(reason)}", (0, 0, 0, 2)))


def _table(first: str, *columns: str) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1))
    table.add_column(first, overflow="fold", ratio=None)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _modules(console: Console, modules: Sequence[Module]) -> None:
    """The modules by component and block."""
    if not modules:
        return
    ported = any(isinstance(m, PortedModule) for m in modules)
    rows = groups(modules, ROW_LIMIT)
    one = len(rows) == len(modules)
    table = _table(
        "module" if one else "block", "" if one else "modules", "share", "sim", *([] if one else ["min"]), "drift"
    )
    if ported:
        table.add_column("kept", justify="right")
    component = ""
    several = len({group.component for group in rows}) > 1
    for group in rows[: 2 * ROW_LIMIT]:
        if several and group.component != component:
            component = group.component
            n = sum(component_of(m.name) == component for m in modules)
            table.add_row(f"[bold]{escape(component)}[/]", *([str(n)] if not one else []))
        table.add_row(*_row(group, one, several), *([percent(group.kept)] if ported else []))
    console.print()
    console.print(table)
    more = len(rows) - 2 * ROW_LIMIT
    hidden = f"{more} more blocks; " if more > 0 else ""
    means = "" if one else "; means and minimum over each block's modules"
    console.print(f"[dim]{hidden}sim: weight similarity{means}; --json has every module[/]")


def _row(group: Group, one: bool, indent: bool) -> list[str]:
    label = group.name if group.component == "model" else group.name.removeprefix(group.component + ".")
    gone = {status: group.count(status) for status in ("skipped", "refused") if group.count(status)}
    n = len(group.modules)
    if one:
        count = "".join(gone)
    elif n in gone.values():
        count = f"{n} {next(iter(gone))}"
    else:
        count = ", ".join([str(n), *(f"{k} {status}" for status, k in gone.items())])
    sims = group.similarities
    return [
        ("  " if indent else "") + escape(label),
        count,
        percent(group.share),
        number(mean(sims)),
        *([] if one else [number(min(sims, default=None))]),
        number(mean(group.distances)),
    ]
