"""What a page tells its reader to run: fenced blocks, and the `regraft` commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md")

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"#.*\bexit code (\d)")
#: Square brackets, alternatives and dots stand for choices that a reader makes.
_SYNOPSIS = re.compile(r"(^|\s)[\[(]|\||…|\.\.\.")


@dataclass(frozen=True)
class Command:
    """One line of a page that begins with ``regraft``.

    Attributes:
        line: as the page has it, without its comment.
        code: the exit code that the page says, in a comment behind the command.
    """

    line: str
    code: int = 0

    @property
    def arguments(self) -> list[str]:
        """What a shell would hand over, ``regraft`` left out; what another command gives is one word."""
        return shlex.split(re.sub(r"\$\(.*\)", "GIVEN", self.line))[1:]

    @property
    def typed(self) -> list[str]:
        """The same with a shell's patterns replaced by what they match."""
        words = [sorted(glob(word)) or [word] if "*" in word else [word] for word in self.arguments]
        return [word for found in words for word in found]

    def simplest(self, given: Mapping[str, str]) -> Command:
        """Of a synopsis the least that can be typed: no option, the first alternative, ``given`` for its words."""
        line = re.sub(r"\[[^\]]*\]", "", self.line)
        line = re.sub(r"\(([^|)]*)[^)]*\)", r"\1", line)
        return Command(" ".join(given.get(word, word) for word in line.split()), self.code)

    @property
    def is_synopsis(self) -> bool:
        """Whether it shows what can be given, and isn't meant to be typed as it is."""
        return bool(_SYNOPSIS.search(re.sub(r"'[^']*'|\"[^\"]*\"|\$\(.*\)", "", self.line)))


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return _FENCE.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[Command]:
    """Every command of the page, in its order."""
    found = []
    for language, text in fences(page):
        if language in ("", "bash", "console", "sh"):
            lines = text.replace("\\\n", " ").splitlines()
            found += [_command(line) for line in lines if line.startswith("regraft ")]
    return found


def _command(line: str) -> Command:
    told = _CODE.search(line)
    return Command(re.sub(r"\s+#.*$", "", line), int(told[1]) if told else 0)


def python(page: Path) -> list[str]:
    """Every block of Python."""
    return [text for language, text in fences(page) if language == "python"]
