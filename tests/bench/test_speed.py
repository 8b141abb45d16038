"""The bench of speed, on a pair that takes no time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import Run
from safetensors.torch import load_file
from tools.speed_page.__main__ import draw

from regraft import open_base
from regraft.bench.speed import curves, plain
from regraft.bench.speed.curves import _curve, _Point
from regraft.bench.speed.making import FAMILIES, by_shape, geometry, grid_geometry, write_lora, write_pair
from regraft.bench.speed.measure import measure
from regraft.bench.speed.table import markdown
from regraft.bench.speed.timing import Spent, forget, reading, spent
from regraft.errors import OutputError, RegraftError
from regraft.pairing import pair_bases

WIDTH = 288


def test_figures_of_a_small_pair(tmp_path: Path) -> None:
    told: list[str] = []
    pair = grid_geometry(WIDTH, 4)
    given = {"threads": 1, "runs": 1, "command": "regraft bench speed", "date": "2000-01-01", "tick": told.append}
    report = measure(pair, tmp_path, ["copy", "lora-x", "lora-x edge=0.35"], **given)
    assert report.modules == 4
    assert [(row.shape, row.modules) for row in report.shapes] == [([WIDTH, WIDTH], 4)]
    copy, projected = report.methods["copy"], report.methods["lora-x"]
    assert (copy.apart, copy.reference_s) == (None, None)
    # Ours goes another way to the same projection, and to the same filter.
    for found in (projected, report.methods["lora-x edge=0.35"]):
        assert found.apart is not None
        assert 0 < found.apart < 1e-3
    assert None not in (copy.warm_s, projected.warm_s, projected.reference_s)
    assert report.migration_mb["lora-x"] > report.migration_mb["copy"]
    assert report.read_s > 0
    assert sorted(file.name for file in (tmp_path / pair.name).iterdir()) == ["new.safetensors", "old.safetensors"]
    assert markdown(report).count("\n") == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_their_true_sizes(family: str) -> None:
    pair = geometry(family)
    billions = {"sd15": 0.86, "sdxl": 2.57, "ssd1b": 2.57, "flux": 11.9}[family]
    count = sum(torch.Size(shape).numel() for shape in pair.old.values())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)
    touched = pair.touched()
    assert len(touched) > 100
    assert sum(map(len, by_shape(touched).values())) == len(touched)


def test_the_pair_is_one_that_was_trained_on(tmp_path: Path) -> None:
    pair = grid_geometry(64, 6)
    old, new = write_pair(pair, tmp_path)
    before, after = load_file(old), load_file(new)
    name = "model.layers.1.self_attn.q_proj.weight"
    drift = (after[name].float() - before[name].float()).norm() / before[name].float().norm()
    assert float(drift) == pytest.approx(pair.drift, rel=0.02)
    # Leading directions stand out, and no weight is another's.
    values = torch.linalg.svdvals(before[name].float())
    assert float(values[0] / values[20]) > 3
    other = before["model.layers.0.self_attn.q_proj.weight"].float()
    assert (
        abs(float(torch.nn.functional.cosine_similarity(other.flatten(), before[name].float().flatten(), dim=0))) < 0.1
    )
    pairing = pair_bases(open_base(old), open_base(new))
    assert all(answer.module == module for module, answer in pairing.counterparts.items())
    written = old.stat().st_mtime_ns
    write_pair(pair, tmp_path)
    assert old.stat().st_mtime_ns == written


def test_what_the_plain_way_was_held_against_is_said(tmp_path: Path) -> None:
    pair = grid_geometry(64, 4)
    old, new = write_pair(pair, tmp_path)
    adapter = write_lora(tmp_path / "lora.safetensors", pair.touched(), "model", 2)
    copied = plain.measure("lora-x", old, new, adapter, adapter)
    # A copy is no projection.
    assert copied["apart"] > 0.1
    assert [row["modules"] for row in copied["shapes"]] == [4]
    few = write_lora(tmp_path / "few.safetensors", {"elsewhere": (64, 64)}, "model", 2)
    with pytest.raises(ValueError, match=r"has no model\.layers\.0"):
        plain.measure("lora-x", old, new, adapter, few)


def test_options_that_the_plain_way_lacks_have_none() -> None:
    assert plain.way_of("lora-x edge=0.5") is not None
    for method in ("lora-x energy=0.5", "lora-x half rank", "prolora rank=4", "copy"):
        assert plain.way_of(method) is None


def test_a_folder_that_can_not_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match="can't be made"):
        write_pair(grid_geometry(8, 1), tmp_path / "file" / "x")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page caches are dropped on Linux alone")
def test_an_interrupt_takes_what_was_begun_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(mark)!r}).touch(); time.sleep(0.05)"
    code = f"from regraft.bench.speed.timing import spent; spent(['-c', {child!r}], threads=1)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not mark.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)
    mark.unlink()
    time.sleep(0.5)
    assert not mark.exists()


def test_the_same_adapter_twice_and_another_by_seed(tmp_path: Path) -> None:
    modules = grid_geometry(64, 4).touched()
    one, same, other = (
        write_lora(tmp_path / f"{index}.safetensors", modules, "model", 2, seed=seed).read_bytes()
        for index, seed in enumerate((0, 0, 1))
    )
    assert one == same
    assert one != other


def test_memory_is_the_commands_own_and_a_failure_says_why(tmp_path: Path) -> None:
    held = bytearray(300 << 20)
    small = spent(["-c", "pass"], threads=1)
    assert small.peak_mb < 100 < len(held) / 1e6
    large = spent(["-c", "x = bytearray(b'x') * (200 << 20)"], threads=1)
    assert large.beyond(small).peak_mb == pytest.approx(210, abs=20)
    with pytest.raises(RegraftError, match="ended with 1: no such luck"):
        spent(["-c", "import sys; sys.exit('no such luck')"], threads=1)
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    forget([file, tmp_path / "none"])
    assert reading([file]) > 0


def test_curves_and_their_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, steps in (("MODULES", (2, 4)), ("WIDTHS", (32, 64)), ("RANKS", (2, 4)), ("ADAPTERS", (1, 2))):
        monkeypatch.setattr(curves, name, steps)
    monkeypatch.setattr(curves, "_WIDTH", 64)
    monkeypatch.setattr(curves, "_MODULES", 4)
    found = list(curves.curves(tmp_path, threads=1, runs=1, method="copy", tick=lambda line: None))
    assert [curve.along for curve in found] == ["modules", "width", "rank", "adapters"]
    assert all(len(curve.seconds) == 2 and min(curve.peak_mb) > 0 for curve in found)
    assert found[2].seconds_per_gigabyte is None
    assert found[0].gigabytes[1] == pytest.approx(2 * found[0].gigabytes[0], rel=0.1)
    assert not list(tmp_path.iterdir())
    draw(found, tmp_path / "speed.svg")
    assert "adapters 1 to 2" in (tmp_path / "speed.svg").read_text(encoding="utf-8")


def test_a_line_through_what_grows() -> None:
    points = [_Point(x, x / 10, Spent(1 + 2 * x / 10, 0.0, 50.0)) for x in (1.0, 2.0, 4.0)]
    curve = _curve("modules", points)
    assert curve.seconds_per_gigabyte == pytest.approx(2.0)
    assert curve.fit == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--family", "sdxxl"], "Known: sd15"),
        (["--methods", "effect"], "Leave it out"),
        (["--methods", "x"], "'x'"),
    ],
)
def test_what_can_not_be_measured_is_said_first(run: Run, arguments: list[str], says: str) -> None:
    result = run("bench", "speed", *arguments)
    assert result.code == 2
    assert says in result.err
