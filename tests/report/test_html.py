"""The pages: each record's renders, says its figures, loads nothing, and shows a stranger's text as text."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser

import pytest
import report_samples as samples

from regraft.report.html import render_check, render_demo, render_port, render_verify
from regraft.report.refine_page import render_refine
from regraft.report.schema import Counts

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags and text; fails on a tag that is closed out of turn."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"style", "code"}:
            self.text += data + " "

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@cache
def pages() -> dict[str, str]:
    pictures = samples.demo().columns[:3]
    return {
        "port": render_port(samples.port()),
        "port with check and verify": render_port(samples.port(), check=samples.check(), verify=samples.verify()),
        "port of nothing": render_port(samples.port([], counts=Counts(ported=0, skipped=0, refused=0), source=None)),
        "check": render_check(samples.check()),
        "verify": render_verify(samples.verify(pictures=pictures, prompts=samples.PROMPTS)),
        "demo": render_demo(samples.demo()),
        "refine": render_refine(samples.refine()),
        "refine of nothing": render_refine(samples.refine(looks=samples.refine().looks[:1], steps=0, pictures=[])),
    }


@pytest.fixture(scope="module", params=pages())
def source(request: pytest.FixtureRequest) -> str:
    return pages()[request.param]


def test_tags_are_balanced(source: str) -> None:
    page = Page(source)
    assert page.tags[0][0] == "html"
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))


def test_nothing_is_loaded_and_no_script_runs(source: str) -> None:
    for tag, attrs in Page(source).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in {"src", "href", "srcset", "poster", "action", "data", "xlink:href"}:
                assert (value or "").startswith("data:image/png;base64,")
    assert "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", source))
    assert not re.search(r"(?:src|href)\s*=\s*['\"]?\s*(?:https?:)?//", source)


def test_port_page_says_verdict_counts_and_skipped_share_before_anything_else() -> None:
    report = samples.port()
    words = Page(render_port(report, verify=samples.verify())).words
    first_screen = words[: words.index("Module by module")]
    assert "Ported" in first_screen
    assert report.summary in first_screen
    assert "180 ported" in first_screen
    assert f"skipped · {100 * report.skipped_share:.1f} % of the norm" in first_screen
    assert "no counterpart: the new base has no middle block" in first_screen
    assert report.method_reason in first_screen
    assert "0.93 0.91 to 0.95" in first_screen
    assert "shuffled" in first_screen


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"forced": True, "verdict": "refused"}, "Forced"),
        ({"verdict": "refine"}, "Ported, refine advised"),
        ({"verdict": "refused"}, "Refused"),
        ({"verdict": None}, "Ported"),
    ],
)
def test_port_banner_tells_each_outcome_in_words(changes: dict[str, object], word: str) -> None:
    assert f"<h1>{word}</h1>" in render_port(samples.port(samples.llm(), **changes))


@pytest.mark.parametrize(
    ("verdict", "word"), [("survives", "Survives"), ("refine", "Needs a refine"), ("refused", "Refused")]
)
def test_check_banner_tells_each_verdict_in_words(verdict: str, word: str) -> None:
    page = render_check(samples.check(samples.llm(), verdict=verdict))
    assert f"<h1>{word}</h1>" in page
    assert "88 %" in page


def test_a_figure_is_explained_only_where_it_is_shown() -> None:
    assert "A diagnostic, not fidelity" in render_port(samples.port())
    assert "A diagnostic, not fidelity" not in render_check(samples.check())
    assert "Effect cosine" not in render_port(samples.port())


def test_strangers_text_shows_as_text() -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    report = samples.port([f"unet.{evil}.0.to_q", "unet.mid_block.to_k"])
    report = report.model_copy(
        update={
            **dict.fromkeys(("input", "method", "method_reason", "summary", "migration"), evil),
            **{name: [evil] for name in ("outputs", "reasons", "unrecognised")},
            "options": {evil: evil},
            "source": samples.base(evil, evil),
            "modules": [m.model_copy(update={"reason": evil, "target": evil}) for m in report.modules],
        }
    )
    columns = [p.model_copy(update={"title": evil, "group": evil, "note": evil}) for p in samples.demo().columns[:2]]
    columns.append(columns[0].model_copy(update={"png": [evil], "figures": {evil: 0.5}}))
    measured = samples.verify(prompts=[evil], pictures=columns, controls={evil: samples.verify().controls["copy"]})
    demo = samples.demo(
        title=evil, intro=evil, prompts=[evil], columns=columns, notes=[evil], same_columns=[(evil, evil)]
    )
    for source in (render_port(report, verify=measured), render_demo(demo), render_verify(measured)):
        page = Page(source)
        assert evil in page.text
        assert "<script" not in source
        assert not [tag for tag, attrs in page.tags if "onerror" in attrs or attrs.get("src") == "x"]


def test_the_record_stands_on_the_page_as_text_without_the_makers_folders() -> None:
    report = samples.port(
        samples.llm(),
        input="/home/someone/loras/style.safetensors",
        outputs=["C:\\Users\\someone\\style-v2.safetensors"],
        reasons=["/home/someone/loras/style.safetensors is a LoRA of rank 16"],
        source=samples.base("/home/someone/.cache/huggingface/hub/models--org--model/snapshots/0123abc"),
        target=samples.base("/data/new/model"),
    )
    page = render_port(report)
    assert "someone" not in page
    assert "/data/new" not in page
    for shown in ("style.safetensors", "style-v2.safetensors", "org/model", "style.safetensors is a LoRA of rank 16"):
        assert shown in page
    assert "&#34;schema_version&#34;: 1" in page


def test_controls_have_plain_names_and_keep_their_notes() -> None:
    partial = samples.interval(0.6).model_copy(update={"reason": "3 of 9 modules have no place"})
    kl = samples.interval(0.0042, 0.0001)
    row = samples.verify().controls["copy"].model_copy(update={"effect_cosine": partial, "kl": kl})
    words = Page(render_verify(samples.verify(controls={"copy": row, "none": row}))).words
    assert "plain copy" in words
    assert "new base alone" in words
    assert "3 of 9 modules have no place" in words
    assert "0.0042 0.0041 to 0.0043" in words


def test_a_port_that_was_not_measured_says_so() -> None:
    report = samples.port(samples.llm())
    assert "has not been measured here" in render_port(report)
    assert "has not been measured here" not in render_port(report, verify=samples.verify())


def test_figures_that_are_no_numbers_show_as_unknown() -> None:
    nan = float("nan")
    report = samples.port(samples.llm())
    broken = {"energy_kept": nan, "share": float("inf"), "similarity": nan, "distance": nan}
    report = report.model_copy(update={"modules": [m.model_copy(update=broken) for m in report.modules]})
    none = samples.interval(nan)
    page = render_port(report, verify=samples.verify(effect_cosine=none, effect_norm_ratio=none))
    assert not re.search(r'"(nan|inf)|:nan|nan%', page)


def test_two_local_bases_of_one_name_stay_apart() -> None:
    page = render_port(
        samples.port(samples.llm(), source=samples.base("/a/v1/unet"), target=samples.base("/a/v2/unet"))
    )
    assert "v1/unet" in page
    assert "v2/unet" in page


def test_demo_sheet_has_every_picture_its_share_and_the_columns_that_are_the_same() -> None:
    demo = samples.demo()
    page = Page(render_demo(demo))
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(demo.prompts) * len(demo.columns)
    assert {image["width"] for image in images} == {"128"}
    assert all(image["alt"] for image in images)
    assert [int(a["colspan"] or 0) for t, a in page.tags if t == "th" and a.get("scope") == "colgroup"] == [2, 4, 2, 1]
    assert "= v2 + copied" in page.words
    assert demo.same_reason in page.words
    assert page.words.count("0.92") >= 2
    assert page.words.count("Refused") == 2


def test_a_picture_that_is_no_png_is_not_embedded() -> None:
    picture = samples.demo().columns[0].model_copy(update={"png": ["bm90IGEgcG5n"]})
    page = render_verify(samples.verify(prompts=["one", "two"], pictures=[picture]))
    assert "<img" not in page
    assert page.count("no picture") == 2


def test_large_pictures_are_shown_smooth_and_no_wider_than_256() -> None:
    picture = samples.demo().columns[0].model_copy(update={"png": [samples.png(1, size=300)]})
    image = next(
        a for t, a in Page(render_verify(samples.verify(prompts=["one"], pictures=[picture]))).tags if t == "img"
    )
    assert image["width"] == "256"
    assert "class" not in image


@pytest.mark.parametrize("render", [render_port, render_check, render_verify, render_demo])
def test_another_record_is_refused(render: object) -> None:
    wrong = samples.check(samples.llm()) if render is not render_check else samples.port(samples.llm())
    with pytest.raises(TypeError, match="this page shows"):
        render(wrong)  # type: ignore[operator]
