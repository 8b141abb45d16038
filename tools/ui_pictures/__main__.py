"""Draw docs/ui.png and docs/ui-compare.png: ``python -m tools.ui_pictures docs``; some minutes on one processor."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

_LONG = 600_000
# The width at which GitHub shows a page's pictures, about twice over.
_WIDTH = 1100


def main(folder: Path) -> None:
    """Take both pictures."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "regraft", "ui", "--no-browser", "-o", out]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        try:
            with sync_playwright() as started:
                chromium = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                window = chromium.new_page(viewport={"width": _WIDTH, "height": 900})
                window.goto(address)
                _take(window, folder)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def _take(window: Any, folder: Path) -> None:
    def do(button: str, shows: str) -> None:
        window.click(button)
        window.wait_for_selector(shows, timeout=_LONG)

    window.wait_for_selector("#demo", timeout=_LONG)
    do("#demo", "#about .about")
    do("#do-forecast", "#result-forecast .verdict")
    for field in ("#lora textarea", "#old input", "#new input"):
        # The rest of the path is this installation's. It is shown shorter, and stays what it is for the page.
        window.evaluate("s => { const f = document.querySelector(s); f.value = f.value.split('/data/').at(-1) }", field)
    _picture(window, folder / "ui.png")
    window.get_by_role("tab", name="Port", exact=True).click()
    do("#do-port", "#result-port .verdict")
    window.get_by_role("tab", name="Compare", exact=True).click()
    do("#do-measure", "#slider img")
    window.wait_for_timeout(2000)
    _picture(window.locator("#slider"), folder / "ui-compare.png")


def _picture(what: Any, path: Path) -> None:
    what.screenshot(path=path, **({"full_page": True} if hasattr(what, "goto") else {}))
    # Few colours: half of the bytes, and nobody sees it.
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
