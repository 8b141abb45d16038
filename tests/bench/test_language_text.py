"""Texts are cut out of archives alike everywhere, and what is held out is never learnt."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from regraft.bench import language_text
from regraft.bench.language_text import (
    CHARACTERS,
    DOMAINS,
    PACKAGES,
    Domain,
    Package,
    load_domain,
    plain,
    split,
    write_whole,
)
from regraft.errors import RegraftError


def test_every_domain_names_packages_that_are_pinned():
    for domain in DOMAINS.values():
        assert {package for package, _ in domain.files} <= set(PACKAGES)
    assert all("==" in package.requirement and len(package.sha256) == 64 for package in PACKAGES.values())


@pytest.mark.parametrize(
    ("raw", "written"),
    [("a\tb\r\nc", "a    b\nc"), ("Zoë naïve", "Zoe naive"), ("→ 猫", "? ?"), (CHARACTERS, CHARACTERS), ("", "")],
)
def test_text_is_written_in_the_characters_that_the_models_know(raw, written):
    assert plain(raw) == written


def test_a_tenth_of_the_blocks_is_held_out_and_nothing_is_lost():
    text = split("".join(f"<{i:05d}>" for i in range(20_000)))
    assert len(text.train) + len(text.test) == 7 * 20_000
    assert 0.08 < len(text.test) / (7 * 20_000) < 0.12
    learnt, held = (set(re.findall(r"<\d{5}>", part)) for part in (text.train, text.test))
    assert not learnt & held
    # A mark on the seam of two blocks is whole in neither part.
    assert 20_000 - len(learnt | held) < 10


def test_windows_are_spread_over_the_held_out_part_from_end_to_end():
    text = split("ab" * 50_000)
    windows = text.windows(5, 100)
    assert [len(window) for window in windows] == [100] * 5
    assert text.test.startswith(windows[0])
    assert text.test.endswith(windows[-1])


def test_a_short_text_has_something_to_test_on():
    assert split("only a line").test == "only a line"


def _sdist(path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        raw = b"1\t2.5\tGood\n2\t-1\tBad\tfilm \nbroken line\n"
        member = tarfile.TarInfo("set/tweets.txt")
        member.size = len(raw)
        tar.addfile(member, io.BytesIO(raw))
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("pkg-1/resources/set.tar.gz")
        member.size = len(inner.getvalue())
        tar.addfile(member, io.BytesIO(inner.getvalue()))


def _wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("pkg/b.js", "second")
        wheel.writestr("pkg/a.js", "first, and more than is taken")
        wheel.writestr("pkg/c.py", "no")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A cache with two archives in it, and the table that knows them."""
    (tmp_path / "text").mkdir()
    table = {}
    for name, make in (("rated.tar.gz", _sdist), ("code.whl", _wheel)):
        file = tmp_path / "text" / name
        make(file)
        table[name.partition(".")[0]] = Package(f"{name}==1", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(language_text, "PACKAGES", table)
    monkeypatch.setattr(
        language_text,
        "DOMAINS",
        {
            "tweets": Domain((("rated", "*/tweets.txt"),), language_text._rated),
            "js": Domain((("code", "*.js"),), longest=5),
            "lost": Domain((("lost", "*"),)),
        },
    )
    return tmp_path


def test_texts_come_from_archives_in_archives(packages):
    assert "Good\nBad    film" in load_domain("tweets", packages).train + load_domain("tweets", packages).test


def test_files_come_in_the_order_of_their_names_and_only_so_long(packages):
    assert load_domain("js", packages).test == "first\nsecon"


def test_a_package_out_of_reach_is_one_line(packages, monkeypatch):
    asked: list[str] = []

    def offline(command, **options):
        asked.extend(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", offline)
    monkeypatch.setitem(language_text.PACKAGES, "lost", Package("no-such-package==1", "0" * 64))
    with pytest.raises(RegraftError, match=r"no-such-package==1 can't be fetched .*No matching distribution"):
        load_domain("lost", packages)
    assert "--require-hashes" in asked
    assert not (packages / "text" / "lost.txt").exists()


def test_translations_are_the_second_half_of_each_entry():
    entry = 'msgid "a"\nmsgstr ""\n"Eins "\n"zwei"\n\n#: x\nmsgid "b"\n"c"\nmsgstr "drei"\n'
    assert language_text._translations(entry) == "Eins \nzwei\ndrei"


def test_a_file_is_replaced_whole(tmp_path):
    write_whole(tmp_path / "new" / "a.txt", "one")
    write_whole(tmp_path / "new" / "a.txt", "two")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.txt"]
    assert (tmp_path / "new" / "a.txt").read_text() == "two"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("python", ("def ", "import ", "self.")),
        ("news", (" the ", " Government ")),
        ("films", ("movie", "film")),
        ("js", ("function", "const ")),
        ("c", ("#include", "template", "static ")),
        ("tweets", ("@anonymous", " lol")),
        ("reviews", ("phone", "camera")),
        ("capitals", (" THE ",)),
        ("dev-web", ("<div", "padding:")),
        ("dev-po", (" para ", " und ")),
    ],
)
def test_a_domain_is_what_it_is_called(name, words, real_cache):
    text = load_domain(name, real_cache)
    assert len(text.train) > 100_000
    assert len(text.test) > 8_000
    assert set(text.train + text.test) <= set(CHARACTERS)
    assert text.train.count("?") < 0.01 * len(text.train)
    assert all(word in text.train for word in words)


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("real")
