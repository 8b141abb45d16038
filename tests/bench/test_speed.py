"""The bench of speed, on a pair that takes no time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from running import Run
from safetensors.torch import load_file

from regraft import open_base
from regraft.bench.speed.curves import _curve, _Point
from regraft.bench.speed.making import FAMILIES, geometry, grid_geometry, of_each_shape, write_lora, write_pair
from regraft.bench.speed.measure import measure
from regraft.bench.speed.table import markdown
from regraft.bench.speed.timing import Spent, forget, reading, spent
from regraft.errors import RegraftError
from regraft.pairing import pair_bases

WIDTH = 288


def test_figures_of_a_small_pair(tmp_path: Path) -> None:
    told: list[str] = []
    pair = grid_geometry(WIDTH, 4)
    given = {"threads": 1, "runs": 1, "command": "regraft bench speed", "date": "2000-01-01", "tick": told.append}
    report = measure(pair, tmp_path, ["copy", "lora-x"], **given)
    assert report.modules == 4
    assert [(row.shape, row.modules) for row in report.shapes] == [([WIDTH, WIDTH], 4)]
    copy, projected = report.methods["copy"], report.methods["lora-x"]
    assert copy.apart == 0
    # Ours goes another way to the same projection.
    assert projected.apart is not None
    assert 0 < projected.apart < 1e-3
    assert None not in (copy.warm_s, projected.warm_s, copy.reference_s)
    assert report.migration_mb["lora-x"] > report.migration_mb["copy"]
    assert report.read_s > 0
    assert not list(tmp_path.glob("*.migration.*"))
    assert markdown(report).count("\n") == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_their_true_sizes(family: str) -> None:
    pair = geometry(family)
    billions = {"sd15": 0.86, "sdxl": 2.57, "ssd1b": 2.57, "flux": 11.9}[family]
    count = sum(torch.Size(shape).numel() for shape in pair.old.values())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)
    touched = pair.touched()
    assert len(touched) > 100
    assert sum(len(sample) for sample in of_each_shape(touched).values()) == len(set(touched.values()))


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
        (["--methods", "x"], "methods"),
    ],
)
def test_what_can_not_be_measured_is_said_first(run: Run, arguments: list[str], says: str) -> None:
    result = run("bench", "speed", *arguments)
    assert result.code == 2
    assert says in result.err
