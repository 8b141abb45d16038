"""``regraft ui``: a page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import _options as o
from regraft.cli._sink import out as console
from regraft.errors import RegraftError


def ui(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="For what is written.")] = Path(
        "regraft-ui"
    ),
    models: Annotated[
        list[Path] | None,
        typer.Option(
            "--models",
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="Offer the bases in it, such as ComfyUI's models; repeatable.",
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="By default 7860, or a free one.")
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Show the address alone.")] = False,
    device: o.Device = "cpu",
) -> None:
    """A page in the browser, on this machine: check, port, refine and compare without a terminal."""
    try:
        from regraft.ui.server import serve
    except ModuleNotFoundError as error:
        missing = f"the page needs {error.name}, which is not installed"
        raise RegraftError(missing, remedy="pip install 'regraft[ui]'") from None

    def told(address: str) -> None:
        console.print(f"Open {address}", soft_wrap=True, markup=False)
        console.print("The address holds a key: keep it to yourself. Ctrl-C ends it.", style="dim", markup=False)

    serve(out, port=port, device=device, models=models or (), browser=not no_browser, told=told)
