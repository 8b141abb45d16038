"""What mkdocs is told beside ``mkdocs.yml``: links that lead out of ``docs/``, and the notebook as a page.

Pages link to other files of the repository as GitHub shows them (``../integrations/comfyui/README.md``). Such files go
into the site under ``repository/``, and the links follow.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from os.path import normpath
from pathlib import Path, PurePosixPath
from posixpath import relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ELSEWHERE = "repository"
NOTEBOOK = "notebook.ipynb"

_LINK = re.compile(r"\]\((?![a-z]+:|/|#)([^)#\s]+)(#[^)\s]*)?\)")


def in_site(path: str) -> str:
    """Where a file of the repository lies in the site: ``docs/faq.md`` → ``faq.md``."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{ELSEWHERE}/{path}"


def in_repository(path: str) -> str:
    """The way back."""
    return path.removeprefix(f"{ELSEWHERE}/") if path.startswith(f"{ELSEWHERE}/") else f"docs/{path}"


def target(source: str, link: str) -> str | None:
    """The repository's file that a link of ``source`` leads to; a folder stands for its README. None: no such file."""
    path = PurePosixPath(normpath(PurePosixPath(source).parent / link)).as_posix()
    if path.startswith(".."):
        return None
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    return path if (ROOT / path).is_file() else None


def linked(source: str) -> Iterator[str]:
    """Every file of the repository that a page links to."""
    for link, _ in _LINK.findall((ROOT / source).read_text(encoding="utf-8")):
        if (found := target(source, link)) is not None:
            yield found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of ``docs/`` that pages link to, pages behind pages too, and the notebook's page."""
    waiting = [in_repository(file.src_uri) for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        for path in linked(waiting.pop()):
            if path in seen:
                continue
            seen.add(path)
            if not path.startswith("docs/"):
                files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
                if path.endswith(".md"):
                    waiting.append(path)
    text, pictures = notebook_page(json.loads((ROOT / "docs" / NOTEBOOK).read_text(encoding="utf-8")))
    files.append(File.generated(config, "notebook.md", content=text))
    for name, png in pictures.items():
        files.append(File.generated(config, name, content=png))
    return files


def on_page_markdown(markdown: str, /, *, page: Page, **_: Any) -> str:
    """Turn a link as GitHub reads it into one between the site's files."""
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        if link[1] == NOTEBOOK and here != "notebook.md":
            # It has a page of its own here, where a browser would show JSON.
            return f"](notebook.md{link[2] or ''})"
        found = target(in_repository(here), link[1])
        return f"]({relpath(in_site(found), PurePosixPath(here).parent)}{link[2] or ''})" if found else link[0]

    return _LINK.sub(moved, markdown)


def notebook_page(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by the names that the page shows them under."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        # A kernel hands over what is printed in pieces.
        if text := "".join("".join(output.get("text", "")) for output in cell["outputs"]).rstrip():
            parts.append(f"``` {{.text .printed}}\n{text}\n```")
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                name = f"notebook-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(output["data"]["image/png"]))
                parts.append(f"![what the cell above draws]({name})")
    parts.append(f"[The notebook itself]({NOTEBOOK}) to download; it runs on a CPU, on the models in the package.")
    return "\n\n".join(parts) + "\n", pictures
