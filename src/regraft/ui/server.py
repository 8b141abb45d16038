"""The page's server: on this machine alone, for whoever has the key in its address, and with no word to any other."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import webbrowser
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from threading import Timer
from urllib.parse import quote

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from regraft.errors import RegraftError
from regraft.ui import page, shown
from regraft.ui.desk import Desk

HOST = "127.0.0.1"
_COOKIE = "regraft-key"
# Nothing from elsewhere is loaded, nothing is sent there, and no other page may show this one.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_SHUT = (
    "<!doctype html><title>regraft</title><p>Open the address that the terminal shows: it holds the key to this page."
)


def make_app(desk: Desk, key: str, models: Sequence[Path] = ()) -> FastAPI:
    """The page, and the files that it hands out.

    Args:
        desk: that it shows.
        key: without which nothing is answered: other people may use this machine, too.
        models: folders whose bases are offered.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.query_params.get("key")
        if given is not None and hmac.compare_digest(given, key):
            # Out of the address bar, and so out of the browser's history of titles and of what is sent on.
            answer: Response = RedirectResponse(request.url.remove_query_params("key"))
            answer.set_cookie(_COOKIE, key, httponly=True, samesite="strict")
            return answer
        if not hmac.compare_digest(request.cookies.get(_COOKIE, ""), key):
            return HTMLResponse(_SHUT, status_code=403)
        answer = await call(request)
        answer.headers["Content-Security-Policy"] = _POLICY
        answer.headers["Referrer-Policy"] = "no-referrer"
        answer.headers["X-Content-Type-Options"] = "nosniff"
        return answer

    @app.get("/files/{token}")
    def file(token: str) -> Response:
        path = desk.served(token)
        if path is None or not path.exists():
            return _gone()
        if path.is_dir():
            return _zipped(path)
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    @app.get("/reports/{token}")
    def report(token: str) -> Response:
        path = desk.served(token)
        return HTMLResponse(path.read_bytes()) if path is not None and path.is_file() else _gone()

    whole: FastAPI = gr.mount_gradio_app(
        app,
        page.build(desk, models),
        path="/",
        server_name=HOST,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=page.LARGEST,
        theme=page.theme(),
        # As `css`, Gradio would rewrite its selectors, and bring it only after the first paint.
        head=f"<style>{shown.style()}</style>",
    )
    return whole


def _gone() -> Response:
    return HTMLResponse("<!doctype html><title>regraft</title><p>This file is no longer there.", status_code=404)


def _zipped(folder: Path) -> Response:
    """A PEFT folder as one file; weights don't pack, so that none of them is tried to."""
    import tempfile
    import zipfile

    # Its end closes it, once the answer is through.
    packed = tempfile.TemporaryFile()  # noqa: SIM115
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{folder.name}/{file.relative_to(folder).as_posix()}")
    packed.seek(0)
    named = {"Content-Disposition": f"attachment; filename*=utf-8''{quote(folder.name)}.zip"}
    return StreamingResponse(iter(lambda: packed.read(1 << 20), b""), media_type="application/zip", headers=named)


def serve(
    out: Path,
    *,
    port: int | None = None,
    device: str = "cpu",
    models: Sequence[Path] = (),
    browser: bool = True,
    told: Callable[[str], None] = print,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        out: folder for what is written; made where it is missing.
        port: to listen at; None takes 7860, or a free one.
        device: that models run on.
        models: folders whose bases are offered.
        browser: open it there.
        told: called with the address.

    Raises:
        RegraftError: the port is taken.
    """
    from regraft.hardware import use_hardware

    use_hardware(device, "float32", None)
    listening = _listen(port)
    desk = Desk(out.absolute(), device)
    key = secrets.token_urlsafe(18)
    desk.worker.start()
    address = f"http://{HOST}:{listening.getsockname()[1]}/?key={key}"
    try:
        app = make_app(desk, key, models)
        told(address)
        if browser:
            opener = Timer(1.0, webbrowser.open, [address])
            opener.daemon = True
            opener.start()
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, ws="none")
        uvicorn.Server(config).run([listening])
    except KeyboardInterrupt:
        # The way to end it; what was at work is stopped below, and nothing is half-written.
        return
    finally:
        desk.worker.close()
        listening.close()


def _listen(port: int | None) -> socket.socket:
    for number in (7860, 0) if port is None else (port,):
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, number))
            return listening
        except OSError as error:
            listening.close()
            why = error
    raise RegraftError(f"port {port} can't be listened at ({why.strerror})", remedy="Take another with --port.")
