"""The page's server answers whoever has its key, on this machine, and hands out what regraft wrote."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'regraft[ui]'")

from fastapi.testclient import TestClient

from regraft.adapter import ModuleRef
from regraft.errors import RegraftError
from regraft.report.schema import InspectReport, Picture
from regraft.ui import shown
from regraft.ui.desk import Desk
from regraft.ui.server import _listen, make_app
from report.report_samples import verify

KEY = "the key"
COOKIE = f"regraft-{hashlib.sha256(KEY.encode()).hexdigest()[:8]}"
HOSTILE = "<img src=x onerror=alert(1)>${alert(1)}{{alert(1)}}"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def client(desk: Desk) -> Iterator[TestClient]:
    with TestClient(make_app(desk, KEY), base_url="http://127.0.0.1:7860") as made:
        yield made


@pytest.fixture
def known(client: TestClient) -> TestClient:
    client.cookies.set(COOKIE, KEY)
    return client


def test_without_the_key_nothing_is_answered(client: TestClient) -> None:
    client.cookies.clear()
    for path in ("/", "/config", "/gradio_api/info", "/files/x", "/?key=wrong", "/?key=%C3%BC"):
        assert client.get(path).status_code == 403
    for wrong in ("wrong", "\xfc"):
        assert client.get("/config", headers={"cookie": f"{COOKIE}={wrong}".encode("latin-1")}).status_code == 403


def test_a_second_page_locks_nobody_out_of_the_first(client: TestClient, tmp_path: Path) -> None:
    client.cookies.clear()
    client.get("/", params={"key": KEY})
    with TestClient(make_app(Desk(tmp_path), "another"), base_url="http://127.0.0.1:7861") as second:
        second.cookies = client.cookies
        assert second.get("/config").status_code == 403
        second.get("/", params={"key": "another"})
        assert second.get("/config").status_code == 200
    assert client.get("/config").status_code == 200


def test_a_page_of_another_server_on_this_machine_is_told_nothing(known: TestClient) -> None:
    assert known.get("/config", headers={"origin": "http://localhost:9999"}).status_code == 403
    assert known.get("/config", headers={"origin": "http://127.0.0.1:7860"}).status_code == 200


def test_the_server_fetches_nothing_from_elsewhere_for_anybody(known: TestClient) -> None:
    for path in ("/gradio_api/file=https://example.org/x", "/gradio_api/proxy=https://example.org/x"):
        assert known.get(path).status_code == 404


def test_what_is_dropped_lies_where_others_cannot_read_it() -> None:
    place = Path(os.environ["GRADIO_TEMP_DIR"])
    assert place.is_dir()
    assert place.stat().st_mode & 0o077 == 0


def test_the_key_opens_the_page_and_leaves_the_address(client: TestClient) -> None:
    client.cookies.clear()
    answer = client.get("/", params={"key": KEY}, follow_redirects=False)
    assert answer.status_code == 307
    assert "key" not in answer.headers["location"]
    assert "httponly" in answer.headers["set-cookie"].lower()


def test_the_page_may_load_nothing_from_elsewhere(known: TestClient) -> None:
    answer = known.get("/")
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "http" not in answer.headers["content-security-policy"]


def test_another_name_for_this_machine_is_turned_away(known: TestClient) -> None:
    assert known.get("/", headers={"host": "evil.example"}).status_code == 400


def test_no_analytics_and_no_fonts_from_elsewhere(known: TestClient) -> None:
    config = known.get("/config").json()
    assert config["analytics_enabled"] is False
    theme = known.get("/theme.css").text
    assert "fonts.googleapis" not in theme
    assert "@import" not in theme


def test_a_written_file_is_handed_out_under_its_name(known: TestClient, desk: Desk, tmp_path: Path) -> None:
    file = tmp_path / "style ported.safetensors"
    file.write_bytes(b"weights")
    answer = known.get(f"/files/{desk.serve(str(file))}")
    assert answer.content == b"weights"
    assert "attachment" in answer.headers["content-disposition"]
    assert known.get(f"/files/{file.name}").status_code == 404
    file.unlink()
    assert known.get(f"/files/{desk.serve(str(file))}").status_code == 404


def test_a_folder_is_handed_out_as_one_file(known: TestClient, desk: Desk, tmp_path: Path) -> None:
    folder = tmp_path / "stil-für-2"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    answer = known.get(f"/files/{desk.serve(str(folder))}")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.read("stil-für-2/adapter_model.safetensors") == b"weights"


def test_a_report_is_shown_and_no_other_file(known: TestClient, desk: Desk, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("<p>what survived", encoding="utf-8")
    assert "what survived" in known.get(f"/reports/{desk.serve(str(page))}").text
    adapter = tmp_path / "style.safetensors"
    adapter.write_bytes(b"<script>alert(1)</script>")
    assert known.get(f"/reports/{desk.serve(str(adapter))}").status_code == 404


def test_a_port_that_is_taken_is_named() -> None:
    first = _listen(0)
    try:
        with pytest.raises(RegraftError, match="can't be listened at"):
            _listen(first.getsockname()[1])
    finally:
        first.close()


def test_hostile_names_and_metadata_are_text() -> None:
    record = InspectReport(
        file=f"/loras/{HOSTILE}",
        format="kohya",
        family=None,
        components={},
        tokens={HOSTILE: [1]},
        metadata={HOSTILE: HOSTILE, "long": "x" * 5000},
        unrecognised=[str(ModuleRef("unet", HOSTILE))],
    )
    for html in (shown.inspected(record), shown.wrong(HOSTILE, HOSTILE)):
        assert "<img" not in html
        assert "&lt;img" in html
    assert len(shown.inspected(record)) < 5000


def test_two_pictures_are_told_apart_from_none_yet_and_none_drawn() -> None:
    # A PNG's first 24 bytes, which hold its size, and no picture.
    head = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (32).to_bytes(4, "big") * 2
    png = base64.b64encode(head).decode()
    record = verify(
        prompts=["a boat", "a sun"],
        pictures=[Picture(title="old", group="", png=[png, png]), Picture(title="new", group="", png=[png, ""])],
    )
    # Half a choice, and one of an older comparison, leave what is shown.
    for choice in ((None, "new", 0), ("old", None, 0), ("old", "new", None), ("older", "new", 0), ("old", "new", 2)):
        assert shown.beside(record, *choice) is None
    assert 'type="range"' in str(shown.beside(record, "old", "new", 0))
    undrawn = str(shown.beside(record, "old", "new", 1))
    assert "could not be drawn" in undrawn
    assert "<img" not in undrawn
