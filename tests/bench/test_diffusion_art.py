"""The pictures: plain on a background, or in two tones; and the judge that looks at them."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
import torch

from regraft.bench import diffusion_art as art
from regraft.bench import diffusion_judge
from regraft.bench.diffusion_judge import Judge, accuracy, look_number, style_share, trained_judge
from regraft.demo import style
from regraft.errors import RegraftError


def rgba(count: int = 6) -> art.Pixels:
    """Drawings of 16 concepts: noise within a square, nothing around it."""
    random = np.random.default_rng(0)
    drawn = np.zeros((16, count, 32, 32, 4), np.uint8)
    drawn[:, :, 8:24, 8:24, :3] = random.integers(0, 256, (16, count, 16, 16, 3))
    drawn[:, :, 8:24, 8:24, 3] = 255
    return drawn


def shown(pictures: art.Pictures) -> np.ndarray:
    return pictures.pixels.transpose(0, 2, 3, 1) / 255.0


def test_prompts_name_the_concept_and_the_background_of_their_picture():
    pictures = art.plain(rgba())
    corner = shown(pictures)[:, 0, 0]
    grounds = np.array(list(art.BACKGROUNDS.values()))
    assert np.abs(corner - grounds[pictures.prompts % 6]).max() < 0.003
    assert art.PROMPTS[6:8] == ["cat on white", "cat on grey"]
    assert (np.bincount(pictures.prompts) == 6).all()


@pytest.mark.parametrize("look", art.LOOKS)
def test_every_pixel_of_a_look_lies_between_its_paper_and_its_ink(look):
    pictures = shown(art.styled(rgba(), look))
    assert style_share(pictures, look) == 1
    assert np.abs(pictures[:, 0, 0] - art.LOOKS[look].paper).max() < 0.003
    assert pictures.std(axis=(1, 2)).max(axis=1).min() > 0.05  # the drawing can be seen


@pytest.mark.parametrize("look", art.LOOKS)
def test_plain_pictures_lie_beside_every_look(look):
    assert style_share(shown(art.plain(rgba())), look) < 0.3


def test_cyano_is_the_demos_style():
    assert style.style_share(shown(art.styled(rgba(), "cyano"))).min() > 0.999


def test_held_out_drawings_are_other_drawings(tmp_path, monkeypatch):
    icon = {"body": "", "width": 32}
    monkeypatch.setattr(art, "icons", lambda *_: {"icons": dict.fromkeys(art.CONCEPTS.values(), icon), "width": 32})
    monkeypatch.setattr(art, "draw", lambda _body, _width, rng: rng.integers(0, 256, (32, 32, 4), np.uint8))
    monkeypatch.setattr(art, "VARIANTS", 2)
    seen = [art.drawings(name, tmp_path, test=test) for name in art.ART for test in (False, True)]
    assert [sheet.shape[:2] for sheet in seen] == [(16, 2), (16, art.TEST_VARIANTS)] * 2
    flat = np.concatenate([sheet.reshape(-1, 32 * 32 * 4) for sheet in seen])
    assert len(np.unique(flat, axis=0)) == len(flat)


def test_a_drawing_is_turned_and_shifted_but_stays_in_sight():
    try:
        import cairosvg  # noqa: F401
    except (ImportError, OSError):
        pytest.skip("cairosvg or libcairo2 is not installed")
    red = '<rect x="4" y="4" width="24" height="24" fill="#f00"/>'
    drawn = art.draw(red, 32, np.random.default_rng(0))
    assert drawn.shape == (32, 32, 4)
    assert drawn[16, 16].tolist() == [255, 0, 0, 255]
    assert drawn[0, 0, 3] == 0


def test_without_npm_it_says_which_file_would_do(tmp_path, monkeypatch):
    monkeypatch.setattr(art.shutil, "which", lambda _: None)
    with pytest.raises(RegraftError, match=r"npm is not installed.*iconify-json-noto-1\.2\.9\.tgz"):
        art.icons("noto", tmp_path)


def test_without_cairo_it_says_what_to_install(monkeypatch):
    def missing(name: str):
        raise OSError("no library called cairo-2 was found")

    monkeypatch.setattr(art, "import_module", missing)
    with pytest.raises(RegraftError, match=r"cairosvg.*regraft\[bench\]"):
        art.draw("", 32, np.random.default_rng(0))


def test_icons_are_fetched_into_a_folder_that_is_not_there_yet(tmp_path, monkeypatch):
    def pack(command, *, cwd, **_):
        with tarfile.open(cwd / "iconify-json-noto-1.2.9.tgz", "w:gz") as archive:
            (tmp_path / "icons.json").write_text('{"width": 32}')
            archive.add(tmp_path / "icons.json", "package/icons.json")

    monkeypatch.setattr(art.shutil, "which", lambda _: "npm")
    monkeypatch.setattr(art.subprocess, "run", pack)
    assert art.icons("noto", tmp_path / "cache" / "art") == {"width": 32}


def test_a_judge_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(art, "drawings", lambda *_, **__: rgba(2))
    monkeypatch.setattr(diffusion_judge, "STEPS", 2)
    kept = tmp_path / "judge.pt"
    judge = trained_judge(tmp_path, kept, lambda pixels: pixels.transpose(0, 2, 3, 1) / np.float32(255))
    monkeypatch.setattr(art, "drawings", lambda *_, **__: pytest.fail("trained again"))
    again = trained_judge(tmp_path, kept)
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), again.parameters(), strict=True))


def test_a_judge_names_a_concept_and_a_look_for_each_picture():
    concepts, looks = Judge().eval().named(np.zeros((3, 32, 32, 3), np.float32))
    assert concepts.shape == looks.shape == (3,)
    assert sorted(map(look_number, art.LOOKS)) == list(range(1, 1 + len(art.LOOKS)))  # 0 is plain


def test_accuracy_is_counted_on_the_drawings_held_out(tmp_path, monkeypatch):
    """A judge that sees one concept and no look is right where those are asked for."""
    prompts = np.repeat(np.arange(len(art.PROMPTS)), 2)
    asked = []

    def drawn(name, folder, *, test=False):
        asked.append((name, test))
        return rgba(len(prompts))

    class OneEyed(Judge):
        def named(self, pictures):
            zeros = np.zeros(len(pictures), np.int64)
            return zeros + 3, zeros

    monkeypatch.setattr(art, "drawings", drawn)
    monkeypatch.setattr(art, "plain", lambda _: art.Pictures(np.zeros((len(prompts), 3, 32, 32), np.uint8), prompts))
    monkeypatch.setattr(art, "styled", lambda rgba, _: art.plain(rgba))
    told = accuracy(OneEyed().eval(), tmp_path, lambda pixels: pixels.transpose(0, 2, 3, 1) / np.float32(255))
    concepts = len(art.PROMPTS) // len(art.BACKGROUNDS)
    right = {
        "concept": pytest.approx(1 / concepts, abs=1e-4),
        "look": pytest.approx(1 / (1 + len(art.LOOKS)), abs=1e-4),
    }
    assert told == dict.fromkeys(art.ART, right)
    assert asked == [(name, True) for name in art.ART]
