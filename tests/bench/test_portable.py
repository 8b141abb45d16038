"""Kinds of adapter beside each other: carried by index, counted, and told in one table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regraft import Adapter, InputError, UsageError
from regraft.adapter import MODEL, ModuleRef
from regraft.bench.by_index import by_index
from regraft.bench.diffusion_judge import Judge
from regraft.bench.diffusion_recipes import ADAPTERS as LOOKS
from regraft.bench.diffusion_score import OF_EACH, VARIED, _diversity
from regraft.bench.group import _numbers
from regraft.bench.language_recipes import ADAPTERS as TEXTS
from regraft.bench.portable_table import BEGIN, END, WRITTEN, kind_of, kinds_page, of_kinds
from regraft.bench.variants import parse_variants
from regraft.report.bench_schema import BenchAdapter, BenchCheck, BenchMethod, BenchPair, BenchReport, BenchRow
from regraft.report.schema import Interval
from regraft.singular import print_of
from regraft.tensors import InMemory
from regraft.updates import LowRank, SpectralShift, Subspace, Update

REF = ModuleRef(MODEL, "one")


def adapter(update: Update) -> Adapter:
    return Adapter({REF: update}, format="peft")


def weight(seed: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def test_by_index_a_shift_moves_the_new_bases_own_singular_values() -> None:
    old, new = weight(0), weight(1)
    shift = torch.tensor([0.5, -0.25, 0.1, 0.0])
    trained = SpectralShift(InMemory(shift), stamp=InMemory(print_of(old)))
    with pytest.raises(InputError):
        trained.merged(new)
    moved = by_index(adapter(trained)).updates[REF]
    found = torch.linalg.svdvals(moved.merged(new))
    torch.testing.assert_close(found, (torch.linalg.svdvals(new) + shift).sort(descending=True).values)


def test_by_index_a_diagonal_lies_on_the_new_bases_own_directions() -> None:
    new = weight(1)
    moved = by_index(adapter(Subspace(InMemory(torch.tensor([1.0, 2.0])), stamp=InMemory(print_of(weight(0))))))
    u, _, vh = torch.linalg.svd(new, full_matrices=False)
    wanted = u[:, :2] @ torch.diag(torch.tensor([1.0, 2.0])) @ vh[:2]
    torch.testing.assert_close(moved.updates[REF].delta(new), wanted, rtol=1e-4, atol=1e-5)


def test_a_lora_has_no_index_to_go_by() -> None:
    plain = LowRank(InMemory(torch.ones(6, 2)), InMemory(torch.ones(2, 4)), 1.0)
    with pytest.raises(InputError, match="by index"):
        by_index(adapter(plain))
    (variant,) = parse_variants(["by-index"])
    assert (variant.method, dict(variant.options)) == ("by-index", {})
    with pytest.raises(UsageError, match="no option"):
        parse_variants(["by-index rank2=3"])


def test_numbers_are_those_that_were_trained() -> None:
    update = LowRank(InMemory(torch.ones(6, 2)), InMemory(torch.ones(2, 4)), 1.0)
    assert _numbers(adapter(update)) == 12 + 8
    shift = SpectralShift(InMemory(torch.ones(4)), stamp=InMemory(print_of(weight(0))))
    assert _numbers(adapter(shift)) == 4


def test_pictures_that_are_all_one_have_no_diversity() -> None:
    torch.manual_seed(0)
    judge = Judge().eval()
    one = torch.rand(VARIED, 1, 32, 32, 3).expand(-1, OF_EACH, -1, -1, -1).reshape(-1, 32, 32, 3)
    assert _diversity(judge, one.numpy()) == pytest.approx(0, abs=1e-5)
    many = torch.rand(VARIED * OF_EACH, 32, 32, 3).numpy()
    seen = judge.features(many)
    pairs = [
        1 - float(seen[i] @ seen[j])
        for first in range(0, VARIED * OF_EACH, OF_EACH)
        for i in range(first, first + OF_EACH)
        for j in range(first, i)
    ]
    assert _diversity(judge, many) == pytest.approx(sum(pairs) / len(pairs), rel=1e-3)
    assert pairs[0] > 0


def share(mean: float) -> Interval:
    return Interval(mean=mean, low=mean - 0.1, high=mean + 0.1)


def row(name: str, mean: float | None, *, refused: bool = False, style: float = 0.5) -> BenchRow:
    found = share(mean) if mean is not None else Interval(mean=None, low=None, high=None)
    return BenchRow(
        name=name,
        kind="method",
        recovery=found,
        versus_copy=found,
        teacher_share=found,
        retention=found,
        refused=refused,
        extra={"style": style, "diversity": 0.25},
        seconds=12.0,
        errors=["no numbers by index"] if mean is None else [],
    )


def one(name: str, native: float, rows: list[BenchRow], numbers: int | None) -> BenchAdapter:
    check = BenchCheck(verdict="survives", numbers=numbers)
    return BenchAdapter(
        name=name, seeds=[0, 1, 2], native_gain=share(native), teacher=share(1), home=share(2.5), check=check, rows=rows
    )


@pytest.fixture
def record() -> BenchReport:
    native = row("native", 1.0, style=0.75)
    plain = one("cyano-lora", 2.0, [native, row("copy", 0.5), row("auto", 0.8), row("by-index", None)], 1234)
    other = one("cyano-lorax", 1.0, [native, row("auto", 0.9), row("lora-x", 0.7, refused=True)], None)
    facts = {"world": "diffusion", "relation": "near", "expects": "near", "about": "made by hand"}
    pair = BenchPair(name="sd-near-2", **facts, adapters=[other, plain], rows=plain.rows)
    return BenchReport(runs=[], methods=[BenchMethod(name="by-index", method="by-index")], groups=[], pairs=[pair])


def cells(page: str, kind: str) -> list[str]:
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {kind} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_holds_what_a_kind_is_at_home_and_carried(record: BenchReport) -> None:
    page = kinds_page(record)
    assert cells(page, "LoRA")[1:] == [
        "1,234", "2.50", "2.00", "0.50", "0.800 [0.70, 0.90]", "", "×", "0.80", "12", "0.75 → 0.50", "0.25 → 0.25",
    ]  # fmt: skip
    carried = cells(page, "LoRA-X, all directions")
    # 0.9 of a native gain of 1, where a native LoRA gains 2.
    assert (carried[1], carried[5], carried[6], carried[8]) == ("–", "0.900 [0.80, 1.00]", "(0.70)", "0.45")
    assert page.index("| LoRA |") < page.index("| LoRA-X, all directions |")


def test_a_kind_of_fewer_seeds_than_the_others_says_so(record: BenchReport) -> None:
    (pair,) = record.pairs
    short, full = pair.adapters
    page = kinds_page(
        record.model_copy(
            update={"pairs": [pair.model_copy(update={"adapters": [short.model_copy(update={"seeds": [1]}), full]})]}
        )
    )
    assert "| 3 seeds |" in page
    assert "| LoRA |" in page
    assert "| LoRA-X, all directions (1) |" in page


def test_a_page_keeps_its_own_words(record: BenchReport) -> None:
    page = f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    found = WRITTEN(page, record)
    assert found.startswith("before\n")
    assert found.endswith("after\n")
    assert "old\n" not in found
    assert "| LoRA |" in found
    assert of_kinds(record)
    assert not of_kinds(record.model_copy(update={"methods": []}))


def test_every_kind_is_there_on_one_text_and_one_look_with_one_budget(tmp_path: Path) -> None:
    looks = {name: recipe for name, recipe in LOOKS.items() if name.startswith("cyano-")}
    assert {kind_of(name) for name in looks} == {"lora", "dora", "foura", "svdiff", "lorax", "lorax-r8"}
    assert len({(recipe.look, recipe.steps, recipe.targets) for recipe in looks.values()}) == 1
    texts = {name: recipe for name, recipe in TEXTS.items() if name == "js" or name.startswith("js-")}
    assert {kind_of(name) for name in texts} == {kind_of(name) for name in looks}
    assert len({(r.domain, r.targets, r.course.steps, r.course.batch) for r in texts.values()}) == 1
    assert kind_of("riso-dora") == "dora"
    assert kind_of("js") == "lora"
