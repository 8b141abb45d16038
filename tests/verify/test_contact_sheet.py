from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from regraft.adapter import Adapter
from regraft.errors import RegraftError
from regraft.probes import pictures
from regraft.report.html import render_verify
from regraft.report.schema import Picture, VerifyReport
from regraft.runtime import load_model
from regraft.verify import verify

TARGETS = ["to_q", "to_v", "to_out.0", "v_proj"]
OLD, NEW = ["old base", "old + original"], ["new base", "new + copied", "new + ported"]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline(tmp_path_factory.mktemp("bases") / "old")


@pytest.fixture(scope="module")
def adapter(old: Path) -> Adapter:
    return tiny.lora(dict(load_model(old).components), TARGETS)


@pytest.fixture(autouse=True)
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "STEPS", 2)


def _columns(report: VerifyReport) -> dict[str, Picture]:
    return {picture.title: picture for picture in report.pictures}


def test_a_row_has_one_prompt_and_one_noise_for_every_column(old: Path, adapter: Adapter) -> None:
    told: list[tuple[int, int, str]] = []
    report = verify(adapter, adapter, old, old, n_inputs=3, pictures=2, tick=lambda *step: told.append(step))
    columns = _columns(report)
    assert list(columns) == OLD + NEW
    assert [picture.group for picture in report.pictures] == ["Old base"] * 2 + ["New base"] * 3
    assert columns["new base"].png == columns["old base"].png
    assert columns["new + ported"].png == columns["new + copied"].png == columns["old + original"].png
    assert columns["old + original"].png != columns["old base"].png
    assert columns["new base"].note == "the same steps and noise"
    assert columns["new + ported"].note == "the same pictures as the copy’s"
    assert all(len(set(picture.png)) == 2 for picture in report.pictures)
    assert [step[0] for step in told] == list(range(1, 3 * 6 + 2 * 5 + 1))
    assert told[-1] == (28, 28, "pictures of new + ported")


def test_the_page_has_a_row_for_every_prompt_that_was_drawn(old: Path, adapter: Adapter) -> None:
    report = verify(adapter, adapter, old, old, n_inputs=3, pictures=2)
    page = render_verify(report)
    assert page.count("<img") == 2 * 5
    assert "no picture" not in page
    rows = re.findall(r'<tr><th scope="row" class="prompt">(.*?)</th>', page)
    assert rows == report.prompts[:2]


def test_a_copy_that_has_no_place_has_no_column(old: Path, adapter: Adapter, tmp_path: Path) -> None:
    new = tiny.pipeline(tmp_path / "new", seed=2, channels=(12, 16))
    partly = verify(adapter, tiny.lora(dict(load_model(new).components), TARGETS), old, new, n_inputs=1, pictures=1)
    assert re.search(r"^\d+ of \d+ modules have no place$", _columns(partly)["new + copied"].note)
    only_unet = tiny.lora({"unet": load_model(old).components["unet"]}, ["down_blocks.0.attentions.0.proj_in"])
    ported = tiny.lora({"unet": load_model(new).components["unet"]}, ["to_q"])
    assert list(_columns(verify(only_unet, ported, old, new, n_inputs=1, pictures=1))) == [*OLD, NEW[0], NEW[2]]


def test_other_latents_mean_other_noise(old: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([16, 16, 16, 8, 8, 8, 8])
    monkeypatch.setattr(pictures, "_size", lambda model: dict.fromkeys(("height", "width"), next(sizes)))
    report = verify(adapter, adapter, old, old, n_inputs=1, pictures=1)
    assert _columns(report)["new base"].note == "other noise: other latents"


def test_pictures_are_made_only_on_request_and_only_by_pipelines(old: Path, adapter: Adapter, tmp_path: Path) -> None:
    assert verify(adapter, adapter, old, old, n_inputs=1).pictures == []
    for make, targets in ((tiny.unet, ["to_q"]), (tiny.llama, ["q_proj"])):
        base = make(tmp_path / make.__name__)
        lora = tiny.lora(dict(load_model(base).components), targets)
        assert verify(lora, lora, base, base, n_inputs=1, pictures=4).pictures == []


def test_no_picture_is_larger_than_512(old: Path) -> None:
    model = load_model(old)
    assert pictures._size(model) == {"height": 16, "width": 16}
    model.main.register_to_config(sample_size=(128, 512))
    assert pictures._size(model) == {"height": 256, "width": 512}


def test_a_decoder_that_gives_nan_leaves_the_place_empty(
    old: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pictures.draw
    monkeypatch.setattr(pictures, "draw", lambda *a, **k: whole(*a, **k) * float("nan"))
    report = verify(adapter, adapter, old, old, n_inputs=1, pictures=1)
    assert all(picture.png == [""] for picture in report.pictures)
    assert "NaN or Inf in place of a picture" in report.pictures[0].note
    assert "no picture" in render_verify(report)


def test_a_pipeline_that_fails_says_how_to_do_without(
    old: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pictures, "draw", fail)
    with pytest.raises(RegraftError, match=r"can't draw a picture \(out of memory\).*--pictures 0"):
        verify(adapter, adapter, old, old, n_inputs=1, pictures=1)
