"""Pictures over the training: few, of the student as it then was, and none of their time in the curve."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

import numpy as np
import pytest
from running import Run

from regraft import Adapter, InputError, load_adapter, open_base
from regraft.probes.pictures import _smaller
from regraft.refine import RefineResult, RefineSettings, Strip, refine
from regraft.refine.loop import Look
from regraft.runtime import load_model
from regraft.runtime.both import BothModels
from verify import tiny

QUICK = RefineSettings(steps=4, look=1, n_inputs=24, rate=5e-3)


@pytest.fixture(scope="module")
def pipes(folder: Path) -> tuple[Path, Path]:
    """Two pipelines of one shape and one autoencoder, whose U-Nets have nothing to do with each other."""
    return tiny.pipeline(folder / "pipe"), tiny.pipeline(folder / "drifted-pipe", drift=0.5)


@pytest.fixture(scope="module")
def lora(pipes: tuple[Path, Path], folder: Path) -> Path:
    return tiny.lora({"unet": load_model(pipes[0]).main}, ("to_q", "to_v"), size=0.4).save(
        folder / "lora.safetensors", format="diffusers"
    )[0]


@pytest.fixture(scope="module")
def result(pipes: tuple[Path, Path], lora: Path) -> RefineResult:
    old, new = map(open_base, pipes)
    return refine(load_adapter(lora), old, new, start="zero", settings=QUICK, strip=Strip(2))


def test_it_begins_with_what_is_wanted_and_ends_with_what_is_kept(result: RefineResult) -> None:
    report = result.report
    titles = [picture.title for picture in report.pictures]
    assert titles[:3] == ["old + adapter", "new base", "start"]
    assert titles[-1] == f"{report.steps} steps"
    assert report.pictures[-1].group == "Kept"
    assert len(report.prompts) == 2
    assert {len(picture.png) for picture in report.pictures} == {2}


def test_a_start_from_zero_draws_what_the_new_base_draws(result: RefineResult) -> None:
    assert result.report.start == "zero"
    assert result.report.looks[0].recovered == pytest.approx(0.0, abs=1e-4)
    by_title = {picture.title: picture.png for picture in result.report.pictures}
    assert by_title["start"] == by_title["new base"]
    assert by_title["old + adapter"] != by_title["new base"]


def test_columns_are_drawn_at_doubling_steps_and_their_time_is_not_the_trainings() -> None:
    strip, drawn = Strip(1), []

    def add(group: str, title: str, *models: object) -> object:
        drawn.append(title)
        strip.seconds += 10.0
        return object()

    strip._sheet = object()  # type: ignore[assignment]
    strip._add = add  # type: ignore[assignment, method-assign]
    looks = [Look(n * 20, 0.5, None, n * 1.0 + 10.0 * min(n, 3)) for n in range(6)]
    for look in looks:
        strip.at(look, object())  # type: ignore[arg-type]
    assert drawn == ["start", "20 steps", "40 steps", "80 steps"]
    assert [strip.training(look) for look in looks[:4]] == [0.0, 1.0, 2.0, 3.0]


def test_without_a_wish_nothing_is_drawn(pipes: tuple[Path, Path], lora: Path) -> None:
    strip = Strip(0)
    strip.before(BothModels.load(*map(open_base, pipes)), load_adapter(lora))
    assert strip.columns == strip.rows == []


def test_language_models_draw_nothing(old: Path) -> None:
    strip = Strip(4)
    strip.before(BothModels.load(open_base(old), open_base(old)), Adapter({}, format="peft"))
    assert strip.columns == []


def test_large_pictures_are_kept_small_by_areas() -> None:
    image = np.zeros((512, 256, 3), dtype=np.float32)
    image[::2] = 1.0
    small = _smaller(image, 192)
    assert small.shape == (192, 96, 3)
    assert np.allclose(small.mean(), 0.5, atol=0.01)
    assert _smaller(image, None) is image


def test_the_command_writes_the_page(run: Run, pipes: tuple[Path, Path], lora: Path, tmp_path: Path) -> None:
    old, new = pipes
    out, page = tmp_path / "out.safetensors", tmp_path / "page.html"
    options = ("--steps", 2, "--n-inputs", 24, "--start", "zero", "--pictures", 1, "--report", page)
    ran = run("refine", lora, "--from", old, "--to", new, "-o", out, *options, "--json")
    assert ran.code == 0, ran.err
    source = page.read_text(encoding="utf-8")
    assert source.count("data:image/png;base64,") == len(ran.record["pictures"]) == 4
    assert str(tmp_path) not in source
    first = base64.b64decode(ran.record["pictures"][0]["png"][0])
    assert max(struct.unpack(">II", first[16:24])) <= 192
    again = run("refine", lora, "--from", old, "--to", new, "-o", tmp_path / "other.safetensors", "--report", page)
    assert again.code == 1
    assert "exists" in again.err
    assert not (tmp_path / "other.safetensors").exists()


def test_an_adapter_whose_kinds_the_new_base_lacks_has_no_start_from_zero(old: Path, folder: Path) -> None:
    bert = tiny.bert(folder / "bert")
    adapter = tiny.lora(load_model(old).main, ("q_proj",))
    with pytest.raises(InputError, match="no kind of module"):
        refine(adapter, open_base(old), open_base(bert), start="zero", settings=QUICK)
