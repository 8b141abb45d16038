"""The page's server: on this machine alone, for whoever has the key in its address, and with no word to any other."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import sys
import tempfile
import webbrowser
import zipfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from threading import Timer
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from regraft.errors import RegraftError
from regraft.ui import page, shown
from regraft.ui._gradio import gr
from regraft.ui.desk import Desk
from regraft.ui.work import writable

HOST = "127.0.0.1"
# Gradio fetches what is elsewhere for whoever asks for it by these paths, which the policy below could not see.
_ELSEWHERE = ("/gradio_api/file=http", "/gradio_api/proxy=", "/file=http", "/proxy=")
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
    # Cookies know no ports, and a second page has a key of its own.
    cookie = f"regraft-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        origin = request.headers.get("origin")
        if origin is not None and origin != f"{request.url.scheme}://{request.url.netloc}":
            # A page of another server on this machine counts as the same site, cookies and all.
            return HTMLResponse(_SHUT, status_code=403)
        if _same(request.query_params.get("key", ""), key):
            # Out of the address bar, and so out of what is shown and sent on.
            answer: Response = RedirectResponse(request.url.remove_query_params("key"))
            # Lax: the address may be followed from a terminal that is a page itself.
            answer.set_cookie(cookie, key, httponly=True, samesite="lax")
            return answer
        if not _same(request.cookies.get(cookie, ""), key):
            return HTMLResponse(_SHUT, status_code=403)
        if request.url.path.startswith(_ELSEWHERE):
            return _gone()
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
        if path is None or path.suffix != ".html" or not path.is_file():
            return _gone()
        return HTMLResponse(path.read_bytes())

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


def _same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), key.encode())


def _gone() -> Response:
    return HTMLResponse("<!doctype html><title>regraft</title><p>This file is no longer there.", status_code=404)


def _zipped(folder: Path) -> Response:
    """A PEFT folder as one file; weights don't pack, so that none of them is tried to."""
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
        RegraftError: the port is taken, there is no such device, or the folder can't be written to.
    """
    from regraft.hardware import use_hardware

    use_hardware(device, "float32", None)
    writable(out)
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
        if sys.platform != "win32":
            # After a restart the port is free at once; on Windows it would be shared with whoever has it.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, number))
            # At once: a bound port that nobody listens at can be bound again.
            listening.listen()
            return listening
        except OSError as error:
            listening.close()
            why = error
    raise RegraftError(f"port {port} can't be listened at ({why.strerror})", remedy="Take another with --port.")
