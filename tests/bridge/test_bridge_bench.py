"""The benchmark of bridges on tiny bases, and what is counted from its figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tools.bench_bridge import __main__ as command
from tools.bench_bridge import cost, full_size, made, styles, summary, ways
from tools.bench_bridge.control import Conditions
from tools.bench_bridge.page import BEGIN, END, page
from tools.bench_bridge.record import Record
from tools.bench_bridge.styles import DEMO, GUIDANCE, NEW, OLD, Bench, Case

from regraft.adapter import Adapter
from regraft.base import open_base
from regraft.bridge.x_adapter.files import save_mapper
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.pairing import mapper_config
from regraft.formats import load_adapter
from regraft.refine import drawn
from regraft.refine.bridged import painter_of
from regraft.runtime.both import BothModels
from verify import tiny

STEPS = 5


@dataclass
class TinyBench(Bench):
    lora: Adapter | None = None

    def adapter(self, base: str, name: str, seed: int) -> Adapter:
        assert (base, self.lora is not None) == (OLD, True)
        return self.lora


@pytest.fixture(scope="module")
def bench(folder: Path) -> TinyBench:
    bases = {OLD: tiny.pipeline(folder / "v1"), NEW: tiny.pipeline(folder / "v3", seed=5, channels=(8, 12))}
    shop: Any = SimpleNamespace(cache=folder / "cache", base=bases.get)
    made = TinyBench(shop, judge=None, refine_steps=2)  # type: ignore[arg-type]
    tiny.lora({"unet": made.old.main}, ("to_q", "to_v"), size=0.4).save(folder / "lora.safetensors", format="diffusers")
    made.lora = load_adapter(folder / "lora.safetensors")
    return made


@pytest.fixture(scope="module")
def mapper(bench: TinyBench, folder: Path) -> Path:
    found = Mapper(mapper_config(bench.old, bench.new, blocks=1))
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    bases = (open_base(bench.shop.base(which)) for which in (OLD, NEW))
    return save_mapper(found, folder / "mapper.safetensors", *bases)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, mapper: Path) -> None:
    monkeypatch.setattr(drawn, "N_PICTURES", 8)
    monkeypatch.setattr(drawn, "LEVELS", 8)
    for module in (drawn, styles, cost):
        monkeypatch.setattr(module, "STEPS", STEPS)
    for module in (ways, cost):
        monkeypatch.setattr(module, "mapper_of", lambda bench, title=None: mapper)


@pytest.mark.slow
def test_adapters_made_of_the_old_ones_are_drawn_by_the_new_base_and_kept(
    bench: TinyBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(bench, DEMO, 0, ("a cat", "rain"))
    alone = case.alone()
    first = {way: ways.WAYS[way](case) for way in made.MADE}
    assert all(np.isfinite(pictures).all() for pictures in first.values())
    assert all(np.abs(pictures - alone).max() > 1e-4 for pictures in first.values())
    files = sorted(file.name for file in (bench.shop.cache / "bridge" / "adapters").iterdir())
    kept = ["distilled-demo-0-2-steps", "refine-demo-0-2-steps", "stream-demo-0"]
    assert files == [f"{name}.{suffix}" for name in kept for suffix in ("json", "safetensors")]
    for name in ("port", "refine"):
        monkeypatch.setattr(made, name, None)
    assert all(np.array_equal(ways.WAYS[way](case), pictures) for way, pictures in first.items())


def test_what_is_distilled_is_what_the_bridge_is_measured_by(bench: TinyBench, mapper: Path) -> None:
    case = Case(bench, DEMO, 0, ("a cat",))
    settings = made.settings_of(case, made.DISTILLED, mapper, None)
    painter = painter_of(BothModels(bench.old, bench.new), bench.adapter(OLD, DEMO, 0), settings)
    assert painter is not None
    painted = painter(settings.prompts or (), 1, 1_000).pictures
    shown = torch.from_numpy(case.x_adapter(mapper)).permute(0, 3, 1, 2)
    assert torch.allclose((painted + 1) / 2, shown, atol=1e-4)
    assert settings.guidance == GUIDANCE
    plain = made.settings_of(case, made.REFINE, None, 7)
    assert (plain.teacher, plain.steps, plain.prompts, plain.guidance) == ("adapter", 7, ("a cat",), GUIDANCE)


def test_passes_are_those_that_each_way_is_said_to_take(bench: TinyBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "PICTURES", 2)
    found = cost.costs(bench)
    scheduler = bench.new.pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    joined = sum(float(time) <= 800 for time in scheduler.timesteps) / STEPS
    assert 0 < joined < 1
    # Guidance doubles the rows: of every base in the first two, of the old one's own drawing in the third.
    wanted = {
        "new alone": (1, 0, 2),
        "delta": (1, 2, 6),
        "X-Adapter": (joined, 1 + joined, 2 + 2 * joined),
    }
    for way, row in found["ways"].items():
        assert (row["new_passes"], row["old_passes"], row["pictures"]) == pytest.approx(wanted[way]), way
        assert row["seconds"] > 0
    assert (found["threads"], found["runs"]) == (1, 3)
    assert not bench.new.main._forward_hooks


# By hand: native gains .8 in style and .5 in look; the second case has a native without any gain in look.
CASES: dict[str, dict[str, dict[str, float]]] = {
    "0": {
        "new alone": {"style": 0.1, "judge": 0.0, "concept": 1.0},
        "native": {"style": 0.9, "judge": 0.5, "concept": 0.8},
        "X-Adapter": {"style": 0.7, "judge": 0.5, "concept": 0.8},
        "delta": {"style": 0.3, "judge": 0.1, "concept": 0.4},
        "delta, λ 1.3": {"style": 0.5, "judge": 0.2, "concept": 0.32},
        "delta, λ 0.5": {"style": 0.14, "judge": 0.0, "concept": 0.8},
        "distilled": {"style": 0.58, "judge": 0.4, "concept": 0.72},
    },
    "1": {
        "new alone": {"style": 0.0, "judge": 0.2, "concept": 0.5},
        "native": {"style": 0.5, "judge": 0.2, "concept": 0.5},
        "X-Adapter": {"style": 0.5, "judge": 0.6, "concept": 0.25},
    },
}


def test_shares_are_of_a_gain_and_things_of_what_is_there() -> None:
    first, second = CASES.values()
    assert summary.shares(first, "X-Adapter") == pytest.approx({"style": 0.75, "judge": 1.0, "concept": 1.0})
    assert summary.shares(second, "X-Adapter") == pytest.approx({"style": 1.0, "concept": 0.5})
    assert summary.shares(first, "distilled", "X-Adapter") == pytest.approx(
        {"style": 0.8, "judge": 0.8, "concept": 0.9}
    )


def test_a_summary_is_the_mean_over_cases_that_have_a_way() -> None:
    nets = {
        "0": {
            "new alone": {"agreement": 0.4, "concept": 1.0},
            "native": {"agreement": 0.8, "concept": 1.0},
            "X-Adapter": {"agreement": 0.7, "concept": 0.5},
        }
    }
    rows = {"styles": {"demo": CASES, "other": {"0": {}}}, "controlnet": nets}
    found = summary.summary(rows)
    bridge = found["styles"]["X-Adapter"]
    assert (bridge["style"], bridge["cases"]) == (0.6, 2)
    assert bridge["share"] == {"style": 0.875, "judge": 1.0, "concept": 0.75}
    assert found["styles"]["delta"]["cases"] == 1
    assert found["distilled"] == {"style": 0.8, "judge": 0.8, "concept": 0.9, "cases": 1}
    assert found["controlnet"]["X-Adapter"] == {"agreement": 0.7, "concept": 0.5, "share": 0.75, "cases": 1}
    # Style times things: .25 · .5, .5 · .4, .05 · 1.
    assert found["best_strength"] == "delta, λ 1.3"
    told = {(goal.claim, goal.least): goal for goal in summary.goals(rows)}
    measured = {name: goal.measured for name, goal in told.items()}
    assert measured["X-Adapter: style, share of native", 0.8] == pytest.approx(0.875)
    assert measured["X-Adapter: things kept", 0.9] == pytest.approx(0.75)
    assert measured["delta sampling: style, share of native", 0.6] == pytest.approx(0.25)
    assert measured["delta sampling: things kept", 0.9] == pytest.approx(0.5)
    assert measured["ControlNet through X-Adapter: agreement, share of native", 0.8] == pytest.approx(0.75)
    assert measured["distilled: look, share of the bridge's", 0.9] == pytest.approx(0.8)
    assert len(told) == 8
    # .75 and 1 of style, 1 and .5 of things.
    for claim, least, reached in (("style, share of native", 0.8, True), ("things kept", 0.9, False)):
        goal = told[f"X-Adapter: {claim}", least]
        assert (goal.reached, goal.held, len(goal.values)) == (reached, 1, 2)
    assert {goal.values for goal in summary.goals({})} == {()}
    assert not any(goal.reached for goal in summary.goals({}))


def test_a_record_is_added_to_and_its_page_tells_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    out.write_text(json.dumps({"command": "the first", "styles": {"demo": CASES}}))
    record = Record(out)
    costs = {
        "new alone": {"new_passes": 1.0, "old_passes": 0.0, "pictures": 2.0, "seconds": 0.2},
        "delta": {"new_passes": 1.0, "old_passes": 2.0, "pictures": 6.0, "seconds": 0.5},
    }
    record.rows["cost"] = {"threads": 1, "pictures": 16, "runs": 3, "steps": 20, "ways": costs}
    for _ in range(2):
        record.finish("the second")
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert (rows["commands"], "command" in rows) == (["the first", "the second"], False)
    text = page(f"before\n{BEGIN}\nold\n{END}\nafter", rows)
    assert text.startswith("before\n")
    assert text.endswith("after")
    assert "| X-Adapter | 0.60 | 0.55 | 0.53 | 0.88 | 1.00 | 0.75 |" in text
    assert "| X-Adapter: things kept | ≥ 0.90 | 0.75 | **no** | 1 of 2 |" in text
    assert "| X-Adapter: style, share of native | ≥ 0.80 | 0.88 | yes | 1 of 2 |" in text
    # Things of what is distilled are .72 of .8: at the mark.
    assert "**Goals reached: 2 of 8**" in text
    missed = text.partition("Missed: ")[2].partition("\n")[0]
    assert "X-Adapter: things kept (0.75 of 0.90); delta sampling: style, share of native (0.25 of 0.60)" in missed
    assert "Reached in the mean, not in every case: X-Adapter: style, share of native (1 of 2, least 0.75)." in missed
    assert "Not measured: ControlNet through X-Adapter: agreement, share of native." in text
    assert "| ControlNet through X-Adapter: agreement, share of native | ≥ 0.80 | – | – | – |" in text
    # Beside what differs in one thing stands what it differs from, of that same case.
    further = text.partition("What it depends on")[2].partition("\n\n")[2].partition("\n\n")[0]
    assert further.splitlines()[2:] == [
        "| X-Adapter | 0.70 | 0.50 | 0.80 | 0.75 | 1.00 | 1.00 |",
        "| delta | 0.30 | 0.10 | 0.40 | 0.25 | 0.20 | 0.50 |",
        "| delta, λ 1.3 | 0.50 | 0.20 | 0.32 | 0.50 | 0.40 | 0.40 |",
        "| delta, λ 0.5 | 0.14 | 0.00 | 0.80 | 0.05 | 0.00 | 1.00 |",
    ]
    assert "style 0.80, look 0.80; things kept, of X-Adapter's: 0.90 (1 case)" in text
    assert "by *delta, λ 1.3*: 0.50 of the style, 0.40 of the things." in text
    assert "| delta | 1.00 | 2.00 | 6.00 | 0.500 | 2.50 |" in text
    assert "ControlNet of v1" not in text
    assert "`the second`" in text


def test_figures_keep_the_date_and_the_version_that_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a record from before each had its own, they are the record's."""
    out = tmp_path / "record.json"
    record = Record(out)
    record.rows["styles"] = {"demo": CASES}
    record.finish("the first")
    assert "measured" not in record.rows
    record.rows |= {"date": "2026-01-02", "regraft_version": "0.0.1"}
    record.write()
    assert "2026-01-02, regraft 0.0.1." in page(f"{BEGIN}{END}", record.rows)
    monkeypatch.setattr("tools.bench_bridge.record.__version__", "0.0.2")
    record = Record(out)
    record.put("new alone", CASES["0"]["new alone"], "styles", "demo", "0")
    record.finish("the second")
    rows = json.loads(out.read_text(encoding="utf-8"))
    today, measured = date.today().isoformat(), rows["measured"]["styles"]["demo"]
    assert measured["0"]["new alone"] == f"{today}, regraft 0.0.2"
    assert measured["0"]["native"] == measured["1"]["new alone"] == "2026-01-02, regraft 0.0.1"
    assert {seed: set(ways) for seed, ways in measured.items()} == {seed: set(ways) for seed, ways in CASES.items()}
    assert (rows["date"], rows["regraft_version"]) == (today, "0.0.2")
    assert f"2026-01-02, regraft 0.0.1; {today}, regraft 0.0.2." in page(f"{BEGIN}{END}", rows)


def test_a_way_that_the_record_has_is_not_measured_again(
    bench: TinyBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_ways: list[tuple[str, str, int]] = []

    def noting(way: str) -> Any:
        def draw(case: Case) -> Any:
            drawn_ways.append((way, case.name, case.seed))
            return np.full((48, 4, 4, 3), 0.5, dtype=np.float32)

        return draw

    chosen = {way: noting(way) for way in ("new alone", "native", "delta")}
    monkeypatch.setattr(command, "wanted", lambda **_: chosen)
    monkeypatch.setattr(TinyBench, "score", lambda *_: {"style": 0.5, "judge": 0.25, "concept": 1.0})
    out, image = tmp_path / "record.json", tmp_path / "strip.png"
    asked = command.parser().parse_args(["--cache", "c", "--out", str(out), "--seeds", "2", "--styles", DEMO])
    before = {"style": 0.1, "judge": 0.1, "concept": 0.1}
    out.write_text(json.dumps({"styles": {DEMO: {"0": {"native": before}}}}))
    assert command.styles(bench, Record(out), asked) == {}
    assert drawn_ways == [(way, DEMO, seed) for seed in (0, 1) for way in chosen if (way, seed) != ("native", 0)]
    # Written as they come, before anything is finished.
    rows = json.loads(out.read_text(encoding="utf-8"))["styles"][DEMO]
    assert rows["0"]["native"] == before
    assert set(rows["0"]) == set(rows["1"]) == set(chosen)
    assert rows["1"]["delta"] == {"style": 0.5, "judge": 0.25, "concept": 1.0}
    # For the strip those of the first case are drawn once more; their figures stay.
    drawn_ways.clear()
    asked.strip = image
    kept = command.styles(bench, Record(out), asked)
    assert drawn_ways == [(way, DEMO, 0) for way in chosen]
    assert json.loads(out.read_text(encoding="utf-8"))["styles"][DEMO] == rows
    command.strip(kept, image)
    # Twelve of the pictures a row, three times as large.
    assert imread(image).shape[:2] == (3 * 4 * 3, 12 * 4 * 3)


def test_agreement_is_the_intersection_over_union_of_the_shapes() -> None:
    covered = np.zeros((1, 32, 32), dtype=bool)
    covered[0, 8:16, 8:16] = True
    conditions = Conditions(np.zeros((1, 32, 32, 3), dtype=np.uint8), covered)
    pictures = np.full((1, 32, 32, 3), 0.25, dtype=np.float32)
    assert conditions.agreement(pictures) == 0
    pictures[0, 8:16, 8:16] = (0.9, 0.1, 0.1)
    assert conditions.agreement(pictures) == 1
    # Half of it, and as much beside it: 32 of 96 cells.
    pictures[:] = 0.25
    pictures[0, 8:16, 12:20] = 0.9
    assert conditions.agreement(pictures) == pytest.approx(1 / 3)


def test_ways_may_be_asked_for_by_name_and_added_later() -> None:
    def asked(*given: str) -> Any:
        return command.parser().parse_args(["--cache", "c", "--out", "o", *given])

    every = asked()
    assert command.parts_of(every) == ("styles", "controlnet", "cost")
    found = ways.wanted(first=True, ablated=every.ablated, only=None)
    assert set(found) == {*ways.WAYS, *ways.FURTHER, *ways.TRAINED_OTHERWISE}
    assert set(ways.wanted(first=False, ablated=every.ablated, only=None)) == set(ways.WAYS)
    assert not {name for name in ways.wanted(first=True, ablated=[], only=None) if " trained " in name}
    few = asked("--ways", "distilled", "X-Adapter trained for twice as long", "--ablated")
    assert command.parts_of(few) == ("styles",)
    only = ways.wanted(first=True, ablated=few.ablated, only=few.ways)
    assert list(only) == ["distilled", "X-Adapter trained for twice as long"]
    assert list(ways.wanted(first=False, ablated=few.ablated, only=few.ways)) == ["distilled"]
    assert command.command_of(few).endswith("--ways distilled 'X-Adapter trained for twice as long'")
    assert command.parts_of(asked("--only", "cost")) == ("cost",)
    with pytest.raises(SystemExit):
        asked("--ways", "nothing")


def test_a_step_at_full_size_is_measured_on_a_device_and_told(
    bench: TinyBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = bench.old.main.config
    # As SDXL's, with a pooled prompt of 10 numbers beside six sizes of 4.
    new = {
        **bench.new.main.config,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 10 + 6 * 4,
    }
    shape = mapper_config(bench.old, bench.new, blocks=1)
    run = full_size.measured("cpu", old, new, shape)
    peaks = [run["peak_mb"][name] for name in ("weights", "sampling step", "training step")]
    assert 0 < peaks[0] <= peaks[1] <= peaks[2]
    assert run["mapper_parameters"] == sum(p.numel() for p in Mapper(shape).parameters())
    out, text = tmp_path / "runs.json", tmp_path / "page.md"
    out.write_text(json.dumps({"cuda": {**run, "on": "a card", "sampling_step_s": 0.25}}))
    text.write_text(f"before\n{full_size.BEGIN}\nold\n{full_size.END}\nafter")
    monkeypatch.setattr(full_size, "measured", lambda device: run)
    given = ["full_size", "--out", str(out), "--page", str(text)]
    monkeypatch.setattr("sys.argv", given)
    full_size.main()
    assert list(json.loads(out.read_text(encoding="utf-8"))) == ["cuda", "cpu"]
    told = text.read_text(encoding="utf-8")
    assert "| cuda, a card |" in told
    assert "| 0.25 s |" in told
    assert told.endswith("after")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", [*given, "--device", "cuda"])
    with pytest.raises(SystemExit):
        full_size.main()
