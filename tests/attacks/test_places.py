"""Hostile surroundings: pages, links, changing files, places that can't be written."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from attack_cases import MODULE, NAME, UP, folder, good
from running import Run
from safetensors.torch import load_file, save_file

from regraft import load_adapter
from regraft.errors import InputError
from regraft.tensor_files import read_safetensors

posix = pytest.mark.skipif(os.name != "posix", reason="needs links, pipes and owners of files")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    old = {f"{MODULE}.weight": torch.randn(8, 8, generator=generator)}
    save_file(old, "old.safetensors")
    save_file({name: w + 0.01 for name, w in old.items()}, "new.safetensors")
    save_file(good(), NAME)
    return tmp_path


PAIR = ("--from", "old.safetensors", "--to", "new.safetensors")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def tags(page: Path) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser.seen


@pytest.mark.parametrize("verb", ["port", "check"])
def test_nothing_out_of_a_file_becomes_a_tag_of_the_report(verb: str, here: Path, run: Run) -> None:
    out = ("-o", "ported.safetensors") if verb == "port" else ()
    assert run(verb, NAME, *PAIR, *out, "--report", "plain.html").code == 0
    hostile = '<script>alert(1)<!--"><img src=x onerror=alert(2)>'
    name = f"{hostile}.safetensors"
    save_file({**good(), f"unknown {hostile}": torch.ones(2)}, name, metadata={hostile: hostile})
    out = ("-o", "again.safetensors", "--allow-partial") if verb == "port" else ()
    ran = run(verb, name, *PAIR, *out, "--report", "hostile.html")
    assert ran.code == 0, ran.err
    page = (here / "hostile.html").read_text(encoding="utf-8")
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    known = {tag for tag, _ in tags(here / "plain.html")} | {"li", "ul", "p"}
    assert {tag for tag, _ in tags(here / "hostile.html")} <= known
    assert not [name for _, attributes in tags(here / "hostile.html") for name in attributes if name.startswith("on")]


@posix
def test_a_link_beside_the_weights_puts_nothing_into_the_output(here: Path, run: Run) -> None:
    opened = folder({}, **{"notes.txt": b"the author's"})(here)
    (here / "secret").write_text("the user's private key")
    (here / opened / "README.md").symlink_to(here / "secret")
    (here / opened / "tokenizer.json").symlink_to("/etc/hostname")
    assert run("port", opened, *PAIR, "-o", "out").code == 0
    names = {path.name for path in (here / "out").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "notes.txt"}


@posix
def test_the_links_of_the_hubs_cache_are_followed(here: Path) -> None:
    blobs, snapshot = here / "repo" / "blobs", here / "repo" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    opened = folder({}, **{"README.md": b"card"})(here)
    for file in (here / opened).iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    adapter = load_adapter(snapshot)
    assert set(adapter.sidecars) == {"README.md"}
    assert len(adapter.updates) == 1


def test_a_file_that_changes_while_it_is_read_is_noticed(here: Path) -> None:
    adapter = load_adapter(NAME)
    save_file({**good(), UP: torch.ones(16, 2)}, NAME)
    os.utime(NAME, ns=(1, 1))
    with pytest.raises(InputError, match=r"has changed since it was opened. Run it again"):
        adapter.save(here / "out.safetensors")
    assert not (here / "out.safetensors").exists()


def test_a_file_that_shrinks_while_it_is_read_is_told(here: Path) -> None:
    ref = read_safetensors(here / NAME).tensors[UP]
    status = os.stat(NAME)
    data = (here / NAME).read_bytes()
    (here / NAME).write_bytes(data[:-40] + bytes(40))
    os.utime(NAME, ns=(status.st_atime_ns, status.st_mtime_ns))
    # Of the same size and time, so that nothing shows it: the values are others, and no crash.
    assert ref.load().shape == (8, 2)
    os.truncate(NAME, len(data) - 40)
    with pytest.raises(InputError, match="has changed since it was opened"):
        ref.load()


@posix
@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="becomes another user for a moment")
def test_a_file_without_permission_is_told(run: Run) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, 0o755)
        path = Path(place) / NAME
        save_file(good(), path)
        path.chmod(0o000)
        os.seteuid(65534)
        try:
            ran = run("inspect", path)
            written = run("convert", path, "-o", Path(place) / "out.safetensors", "--format", "peft")
        finally:
            os.seteuid(0)
    assert ran.code == written.code == 1
    assert ran.err == f"regraft: {path}: no permission to read. Change its permissions, or copy it.\n"


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("n" * 300 + ".safetensors", "can't be written .*too long"),
        ("gone/out.safetensors", "gone: the output folder does not exist. Make it first"),
        ("old.safetensors/out.safetensors", "the output folder does not exist|Not a directory"),
        (NAME, "lora.safetensors: exists already. Choose another name, or pass --overwrite"),
        ("out.pt", "out.pt: the output is a safetensors file. Give it the suffix"),
        (".", "is the current folder, or one above it. Name a folder inside"),
        ("", "."),
    ],
)
def test_an_output_that_can_not_be_is_told_before_any_work(output: str, says: str, here: Path, run: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    ran = run("convert", NAME, "-o", output, "--format", "diffusers")
    assert ran.code in (1, 2)
    assert ran.err.count("\n") == 1
    assert re.search(says, ran.err), ran.err
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


@posix
def test_an_output_of_the_longest_name_is_written(here: Path, run: Run) -> None:
    name = "n" * (255 - len(".safetensors")) + ".safetensors"
    assert run("convert", NAME, "-o", name, "--format", "diffusers").code == 0
    assert len(load_file(here / name)) == 2
    assert not list(here.glob(".*"))


@posix
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/null", path)], ids=["pipe", "device"])
def test_a_pipe_or_device_is_never_written_over(make, here: Path, run: Run) -> None:
    make("out.safetensors")
    ran = run("convert", NAME, "-o", "out.safetensors", "--format", "diffusers", "--overwrite")
    assert ran.code == 1
    assert "out.safetensors: is no regular file. Choose another name" in ran.err
    assert not Path("out.safetensors").is_file()


def test_two_modules_of_one_flattened_name_do_not_overwrite_each_other(here: Path, run: Run) -> None:
    stem = "base_model.model.down_blocks.0.attentions.0"
    pairs = {
        f"{stem}.{path}.lora_{half}.weight": torch.ones(shape)
        for path in ("to_q", "to.q")
        for half, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    save_file(pairs, "adapter_model.safetensors")
    ran = run("convert", "adapter_model.safetensors", "-o", "out.safetensors", "--format", "kohya")
    if ran.code == 0:
        assert len([key for key in load_file("out.safetensors") if key.endswith("lora_up.weight")]) == 2
    else:
        assert ran.code == 1
        assert not Path("out.safetensors").exists()
