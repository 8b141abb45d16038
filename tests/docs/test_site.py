"""The pages as a site: built without a warning, and nothing in it is asked of another host; the notebook runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `mkdocs build --strict` does: a page without a place, a dead link or anchor would be an error."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


class Asked(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio"):
            self.addresses.append(named.get("src") or "")
        elif tag == "link" and named.get("rel") in ("stylesheet", "icon", "preload", "preconnect", "dns-prefetch"):
            self.addresses.append(named.get("href") or "")


def test_no_page_asks_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        asked = Asked()
        asked.feed(page.read_text(encoding="utf-8"))
        outside = [address for address in asked.addresses if re.match(r"(https?:)?//", address)]
        assert not outside, f"{page.name}: {outside}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_links_out_of_the_pages_lead_to_files_of_the_repository(site: Path) -> None:
    page = (site / "standard.html").read_text(encoding="utf-8")
    assert 'href="repository/src/regraft/schemas/lineage.json"' in page
    copied = site / "repository" / "src" / "regraft" / "schemas" / "lineage.json"
    assert copied.read_bytes() == (ROOT / "src" / "regraft" / "schemas" / "lineage.json").read_bytes()
    assert 'href="repository/CONTRIBUTING.html"' in (site / "for-researchers.html").read_text(encoding="utf-8")


def test_the_notebook_is_a_page_with_its_pictures(site: Path) -> None:
    assert 'src="notebook-1.png"' in (site / "notebook.html").read_text(encoding="utf-8")
    assert 'href="notebook.html"' in re.sub(r"<nav.*?</nav>", "", (site / "index.html").read_text("utf-8"), flags=re.S)
    assert (site / "notebook-1.png").read_bytes().startswith(b"\x89PNG")


def test_the_notebook_tells_nothing_of_a_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 250_000
    cells = json.loads(text)["cells"]
    told = [line for cell in cells for output in cell.get("outputs", []) for line in output.get("text", [])]
    assert told
    assert not [line for line in told if re.search(r"(^|\s)/\w+/", line)]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(NOTEBOOK, as_version=4)
    # On busy processors pictures can come long after their cell is through.
    NotebookClient(book, timeout=900, iopub_timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any("image/png" in output.get("data", {}) for output in book.cells[-2].outputs)
