"""Logit arithmetic as a row of the grid: what it scores is what the models say, and the table says what was scored."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from running import Run
from test_language import toy_world

from regraft.bench import language
from regraft.bench.group import Group
from regraft.bench.language import LanguageWorld
from regraft.bench.logits_table import BEGIN, END, WRITTEN, logits_page, of_logits
from regraft.bench.results import save
from regraft.bench.variants import parse_variants
from regraft.errors import InputError, UsageError
from regraft.report.bench_schema import BenchAdapter, BenchCheck, BenchMethod, BenchPair, BenchReport, BenchRow
from regraft.report.schema import Interval


@pytest.fixture(scope="module", autouse=True)
def _few_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "WINDOWS", 4)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> LanguageWorld:
    return toy_world(tmp_path_factory.mktemp("bench"))


def group(world: LanguageWorld, pair: str) -> Group:
    (spec,) = (spec for spec in world.pairs if spec.name == pair)
    return Group(world, spec, "plain", 0)


@pytest.mark.parametrize("pair", ["lm-scratch", "lm-tokenizer"])
def test_without_strength_it_scores_as_the_new_base_does(world: LanguageWorld, pair: str) -> None:
    one = group(world, pair)
    cell = one.method(*parse_variants(["logits strength=0"]))
    alone = one.on_new(None)
    np.testing.assert_allclose(cell.task, alone.task, rtol=1e-4)
    np.testing.assert_allclose(cell.retention, alone.retention, rtol=1e-4)
    one.close()


def test_between_equal_bases_it_scores_as_the_adapter_does(world: LanguageWorld, monkeypatch) -> None:
    one = group(world, "lm-drift-1")
    monkeypatch.setattr(one, "model", lambda which, model=one.model: model("old"))
    cell = one.method(*parse_variants(["logits"]))
    np.testing.assert_allclose(cell.task, one.on_old(one.adapter).task, rtol=1e-4)
    one.close()


def test_what_is_asked_of_it_is_looked_through() -> None:
    (variant,) = parse_variants(["logits strength=0.85"])
    assert (variant.method, dict(variant.options)) == ("logits", {"strength": 0.85})
    (variant,) = parse_variants(["logits mix=0.9"])
    assert dict(variant.options) == {"mix": 0.9}
    numbers = ("strength=much", "strength=true", "strength=NaN", "mix=much", "mix=true")
    for wrong in ("pull=1", *numbers, "rank=16", "n_inputs=4"):
        with pytest.raises(UsageError, match="logits"):
            parse_variants([f"logits {wrong}"])
    with pytest.raises(UsageError, match="no part of a mixture"):
        parse_variants(["logits mix=1"])


def test_a_world_without_texts_says_so(world: LanguageWorld, monkeypatch) -> None:
    one = group(world, "lm-drift-1")
    monkeypatch.setattr(one, "model", {"old": one.model("old"), "new": one.model("new")}.__getitem__)
    assert one.adapter
    monkeypatch.setattr(one, "world", object())
    with pytest.raises(InputError, match="no language models"):
        one.method(*parse_variants(["logits"]))
    one.close()


def share(mean: float) -> Interval:
    return Interval(mean=mean, low=mean - 0.1, high=mean + 0.1)


def row(
    name: str, kind: Literal["control", "method"], mean: float, retention: float, *, refused: bool = False
) -> BenchRow:
    found = share(mean)
    return BenchRow(
        name=name,
        kind=kind,
        recovery=found,
        versus_copy=found,
        teacher_share=found,
        retention=share(retention),
        refused=refused,
    )


@pytest.fixture
def record() -> BenchReport:
    rows = [
        row("native", "control", 1.0, -0.25),
        row("reverted", "control", 1.12, -0.5),
        row("auto", "method", 0.03, 0.9, refused=True),
        row("logits", "method", 0.63, -0.75),
        row("logits strength=0.85", "method", 0.66, -0.5),
        row("logits mix=0.9", "method", 1.02, 0.75),
    ]
    one = BenchAdapter(
        name="js",
        seeds=[0, 2],
        native_gain=share(0.7),
        teacher=share(0.7),
        check=BenchCheck(verdict="refused"),
        rows=rows,
    )
    facts = {"world": "language", "relation": "scratch", "expects": "far", "about": "made by hand"}
    methods = [
        BenchMethod(name="auto", method="auto"),
        BenchMethod(name="logits", method="logits"),
        BenchMethod(name="logits strength=0.85", method="logits", options={"strength": 0.85}),
        BenchMethod(name="logits mix=0.9", method="logits", options={"mix": 0.9}),
    ]
    pair = BenchPair(name="lm-scratch", **facts, adapters=[one], rows=rows)
    return BenchReport(runs=[], methods=methods, groups=[], pairs=[pair])


def test_the_table_says_what_was_scored(record: BenchReport, tmp_path: Path, run: Run) -> None:
    assert of_logits(record)
    head, _, line = (text for text in logits_page(record).splitlines()[2:5])
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in (head, line)]
    assert dict(zip(*cells, strict=True)) == {
        "pair": "lm-scratch, far",
        "adapters": "js",
        "seeds": "0, 2",
        "auto": "(0.030 [−0.07, 0.13])",
        "λ = 1": "0.630 [0.53, 0.73]",
        "λ = 0.85": "0.660 [0.56, 0.76]",
        "λ = 1, mix 0.9": "1.020 [0.92, 1.12]",
        "old + adapter": "1.12",
        "retention: native": "−0.25",
        "retention: λ = 1": "−0.75",
        "retention: λ = 0.85": "−0.50",
        "retention: λ = 1, mix 0.9": "0.75",
    }
    save(record, tmp_path / "record.json")
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    run("bench", "table", tmp_path / "record.json", "--markdown", page, "--quiet")
    text = page.read_text(encoding="utf-8")
    assert text == WRITTEN(text, record)
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "lm-scratch, far" in text
    assert "old\n<" not in text
