"""The page in a real browser: a headless Chromium over a server that `regraft ui` started, on the embedded demo."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from regraft.demo import data_folder

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'regraft[ui]'")
from regraft.report.schema import Picture
from regraft.ui import shown
from report.report_samples import verify

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'regraft[test]'")

CHROMIUM = os.environ.get("REGRAFT_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

DATA = data_folder()
HOSTILE = '<img src=x onerror="document.title=`owned`">${document.title="owned"}{{1+1}}'
_LONG = 240_000


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def address(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    environment = {**os.environ, "REGRAFT_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "regraft", "ui", "--no-browser", "-o", str(out)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert server.stdout is not None
    told = ""
    for line in server.stdout:
        told += line
        if found := re.search(r"http://\S+", line):
            break
    assert found, told
    yield found[0]
    server.send_signal(signal.SIGINT)
    rest, _ = server.communicate(timeout=60)
    assert server.returncode == 0, rest
    assert "Traceback" not in rest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Page:
    """A window, with what it asked for and complained of."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.window = self.context.new_page()
        self.outside: list[str] = []
        self.complaints: list[str] = []
        self.window.on("request", self._asked)
        self.window.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.window.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.window.goto(address)
        self.window.wait_for_selector("#demo", timeout=_LONG)
        # Buttons are drawn before Gradio hears them; once what is on the desk was asked for, it does.
        self.window.wait_for_load_state("networkidle", timeout=_LONG)

    def _asked(self, request: Any) -> None:
        if not re.match(r"(http://127\.0\.0\.1:\d+/|data:|blob:)", request.url):
            self.outside.append(request.url)

    def tab(self, name: str) -> None:
        self.window.get_by_role("tab", name=name, exact=True).click()

    def text(self, selector: str) -> str:
        return self.window.locator(selector).inner_text()

    def shows(self, selector: str) -> None:
        self.window.wait_for_selector(selector, timeout=_LONG)

    def demo(self) -> None:
        self.window.click("#demo")
        self.shows("#about .about")
        # What a click fills in comes field by field.
        self.window.wait_for_function("document.querySelector('#new input').value.endsWith('v2')")


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    made = Page(browser, address, viewport={"width": 1200, "height": 900}, accept_downloads=True)
    yield made
    made.context.close()


def test_the_demo_is_forecast_and_nothing_outside_is_asked_for(page: Page) -> None:
    page.demo()
    assert "84 modules" in page.text("#about")
    page.window.click("#do-forecast")
    page.shows("#result-forecast .verdict")
    assert "Survives" in page.text("#result-forecast")
    assert "of a native adapter’s gain, forecast" in page.text("#result-forecast")
    assert page.outside == []
    assert page.complaints == []


def test_what_is_missing_is_said_in_plain_words(page: Page) -> None:
    page.tab("Port")
    page.window.click("#do-port")
    page.shows("#status [role=alert]")
    assert "The LoRA is missing" in page.text("#status")
    page.window.fill("#lora textarea", "/no/such.safetensors")
    page.window.keyboard.press("Tab")
    page.shows("#about [role=alert]")
    assert "no such file" in page.text("#about")


def test_a_hostile_name_and_metadata_are_text(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "<b onmouseover=alert(1)>.safetensors"
    save_file(load_file(DATA / "loras" / "style-v1.safetensors"), file, metadata={"ss_tag": HOSTILE, HOSTILE: "x"})
    page.window.set_input_files("#file input[type=file]", file)
    page.shows("#about .about")
    page.window.click("#about summary")
    assert HOSTILE in page.text("#about")
    page.window.fill("#lora textarea", f"/loras/{HOSTILE}")
    page.window.keyboard.press("Tab")
    page.shows("#about [role=alert]")
    assert page.window.locator("#about img").count() == 0
    assert page.window.title() == "regraft"


def test_a_refusal_is_told_with_its_reason(page: Page) -> None:
    page.demo()
    page.window.fill("#new input", str(DATA / "v2-retrained"))
    page.window.keyboard.press("Enter")
    page.window.click("#do-forecast")
    page.shows("#result-forecast .verdict.bad")
    page.tab("Port")
    page.window.click("#do-port")
    page.shows("#status [role=alert]")
    assert "unrelated" in page.text("#status") or "trained" in page.text("#status")


def test_it_is_worked_by_keyboard_alone(page: Page) -> None:
    window = page.window

    def go_to(selector: str) -> None:
        for _ in range(40):
            window.keyboard.press("Tab")
            if window.evaluate("s => document.activeElement.closest(s) !== null", selector):
                return
        raise AssertionError(f"{selector} is not reached")

    go_to("#demo")
    window.keyboard.press("Enter")
    page.shows("#about .about")
    go_to("#do-forecast")
    window.keyboard.press("Enter")
    page.shows("#result-forecast .verdict")


def _shown(window: Any) -> float:
    """How much of the left picture the slider lets be seen, in percent of its width."""
    at = window.locator(".stage").evaluate("e => getComputedStyle(e).getPropertyValue('--at')")
    return float(at.removesuffix("%"))


def _png(size: int, colour: str) -> str:
    made = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(made, "PNG")
    return base64.b64encode(made.getvalue()).decode()


@pytest.fixture(scope="module")
def pair() -> str:
    """A document with the slider over a red and a blue picture, both named by a stranger."""
    record = verify(
        prompts=[f"a boat {HOSTILE}"],
        pictures=[
            Picture(title=f"{name} {HOSTILE}", group="", png=[_png(32, colour)])
            for name, colour in (("left", "red"), ("right", "blue"))
        ],
    )
    names = [picture.title for picture in record.pictures]
    return f"<!doctype html><style>{shown.style()}</style>{shown.beside(record, *names, 0)}"


@pytest.mark.parametrize("width", [1200, 390])
def test_the_line_between_two_pictures_is_moved_by_keys_mouse_and_finger(browser: Any, pair: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, has_touch=True)
    window = context.new_page()
    window.set_content(pair)
    slider = window.get_by_role("slider", name="How much of the left picture")
    assert _shown(window) == 50
    window.keyboard.press("Tab")
    assert slider.evaluate("e => e === document.activeElement")
    for key, share in (("ArrowRight", 51), ("ArrowLeft", 50), ("ArrowUp", 51), ("Home", 0), ("End", 100)):
        window.keyboard.press(key)
        assert _shown(window) == share
        assert slider.get_attribute("aria-valuetext") == (f"{share} % left {HOSTILE}, {100 - share} % right {HOSTILE}")
    box = window.locator(".stage").bounding_box()
    middle = box["y"] + box["height"] / 3
    window.mouse.click(box["x"] + box["width"] / 4, middle)
    assert _shown(window) == pytest.approx(25, abs=1)
    window.touchscreen.tap(box["x"] + 0.9 * box["width"], middle)
    assert _shown(window) == pytest.approx(90, abs=1)
    seen = Image.open(io.BytesIO(window.screenshot())).convert("RGB")
    assert [seen.getpixel((round(box["x"] + at * box["width"]), round(middle))) for at in (0.8, 0.97)] == [
        (255, 0, 0),
        (0, 0, 255),
    ]
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert window.title() != "owned"
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_whole_in_the_colours_that_it_likes(browser: Any, address: str, scheme: str) -> None:
    page = Page(browser, address, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.demo()
    page.window.click("#do-forecast")
    page.shows("#result-forecast .verdict")
    assert page.window.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ground = page.window.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.window.evaluate("getComputedStyle(document.querySelector('#about .name')).color")
    light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (ground, ink))
    assert abs(light - dark) > 120
    assert (light > dark) == (scheme == "light")
    page.context.close()


def test_the_ground_has_its_colour_before_the_page_is_there(browser: Any, address: str) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    # Nothing but the document itself: no script and no style that comes later has a part in it.
    page.route(re.compile(r"\.(js|css)"), lambda route: route.abort())
    page.goto(address)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 22)"
    context.close()


def test_a_file_of_this_computer_is_found_by_browsing(page: Page, tmp_path: Path) -> None:
    shutil.copy(DATA / "loras" / "style-v1.safetensors", tmp_path / "mine.safetensors")
    page.window.click("#browse button")
    page.window.fill("#root textarea", str(tmp_path))
    page.window.keyboard.press("Enter")
    page.window.locator("#tree li", has_text="mine.safetensors").get_by_role("checkbox").check()
    page.window.get_by_role("button", name="It is the LoRA").click()
    page.shows("#about .about")
    assert page.window.input_value("#lora textarea") == str(tmp_path / "mine.safetensors")


def test_a_base_ported_to_itself_is_downloaded_as_the_same_tensors(page: Page, tmp_path: Path) -> None:
    page.demo()
    page.window.fill("#new input", str(DATA / "v1"))
    page.window.keyboard.press("Enter")
    page.tab("Port")
    page.window.click("#do-port")
    page.shows("#result-port .links")
    with page.window.expect_download() as awaited:
        page.window.get_by_role("link", name=re.compile("Download")).click()
    awaited.value.save_as(tmp_path / "got.safetensors")
    got, original = load_file(tmp_path / "got.safetensors"), load_file(DATA / "loras" / "style-v1.safetensors")
    assert all(torch.equal(got[key], original[key]) for key in original)
    with page.context.expect_page() as opened:
        page.window.get_by_role("link", name="Open the report").click()
    opened.value.wait_for_load_state()
    assert "Ported" in opened.value.inner_text("h1")


@pytest.mark.slow
def test_the_whole_path_on_the_demo(page: Page, out: Path) -> None:
    page.demo()
    page.tab("Port")
    page.window.click("#do-port")
    page.shows("#status progress[max]")
    # Another window shows the same desk.
    other = page.context.new_page()
    other.goto(page.window.url)
    other.wait_for_selector("#status progress", timeout=_LONG)
    other.close()
    page.shows("#result-port .verdict")
    page.tab("Refine")
    page.window.fill("#minutes input[type=number]", "1")
    page.window.keyboard.press("Tab")
    page.window.click("#do-refine")
    page.shows("#live .sheet img")
    page.window.click("#stop")
    page.shows("#status :text('stopped')")
    page.window.click("#do-refine")
    page.shows("#result-refine .verdict")
    assert "of what is wanted" in page.text("#result-refine")
    assert page.window.locator("#result-refine .sheet img").count() > 8
    page.tab("Compare")
    page.window.get_by_label("what was refined").check()
    page.window.click("#do-measure")
    page.shows("#result-measure .sheet img")
    page.shows("#slider img")
    page.window.get_by_role("slider", name="How much of the left picture").press("ArrowRight")
    assert _shown(page.window) == 51
    page.tab("A whole folder")
    page.window.fill("#folder textarea", str(DATA / "loras"))
    page.window.click("#do-check-all")
    page.shows("#result-library table")
    assert page.outside == []
    written = {file.name for file in out.iterdir()}
    assert any(re.fullmatch(r"style-v1-refined.*\.safetensors", name) for name in written)
    assert page.complaints == []
