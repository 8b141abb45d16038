from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools.make_docs.__main__ import PAGE, page

from regraft.cli import VERBS
from regraft.methods import methods

ROOT = Path(__file__).parents[2]


def test_the_page_of_methods_is_what_the_registry_gives() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tools.make_docs"


def test_the_readme_names_every_verb_and_method() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"regraft {verb}" in text
    for method in methods():
        assert f"`{method}`" in text


@pytest.mark.parametrize("file", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda f: f.name)
def test_links_between_pages_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), target


def test_the_readme_commands_are_the_ones_that_ci_runs() -> None:
    text, ci = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -c constraints.txt '.[run]' && regraft demo" in text
    command = "pip install -c constraints.txt '.[test]' && pytest"
    assert command in text
    assert command.replace("install", "install -q") in ci
