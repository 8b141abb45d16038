"""The benchmark's record as one self-contained HTML page: no script, nothing loaded from anywhere."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from regraft.bench.controls import CONTROLS
from regraft.bench.goals import goals
from regraft.bench.refine_goals import refine_goals
from regraft.bench.refine_table import of_refine
from regraft.bench.results import WORLDS
from regraft.bench.table import legend, made, recovery, rows_of, summary
from regraft.report.bench_chart import draw_pair, tone
from regraft.report.bench_schema import BenchReport
from regraft.report.html import environment


def render_bench(record: BenchReport) -> str:
    """The page of the benchmark."""
    head, _ = summary(record)
    table = [
        (name, [next((row for row in group.rows if row.name == name), None) for group in record.groups])
        for name in rows_of(record)
    ]
    return (
        environment()
        .get_template("bench.html")
        .render(
            record=record,
            head=head,
            table=table,
            recovery=recovery,
            tone=tone,
            goals=refine_goals(record) if of_refine(record) else goals(record),
            charts={pair.name: Markup(draw_pair(pair)) for pair in record.pairs},
            worlds=WORLDS,
            controls_said=CONTROLS,
            legend=_with_code(legend(record)),
            runs=list(zip(record.runs, made(record), strict=True)),
            adapters=sum(len(pair.adapters) for pair in record.pairs),
        )
    )


def _with_code(text: str) -> Markup:
    """Markdown's backticks as HTML has them."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))
