"""The one small family of errors. Each says what is wrong, where, and what to do next.

The command line prints ``str(error)`` as one line and exits with ``exit_code``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Control characters (C0, DEL, C1), marks that reverse the direction of what follows, line separators and lone
# surrogates: on a terminal they would do something, not show something.
_ACTIVE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# A key from a damaged file may have megabytes; a line that nobody can read tells nothing.
_LONGEST_FILE, _LONGEST_KEY, _LONGEST_WHAT = 1000, 300, 600


def printable(text: str, keep: str = "") -> str:
    """``text`` with every character that a terminal would obey written out, as ``\\x1b``.

    Args:
        text: words that may come from a stranger's file.
        keep: characters to leave as they are, such as a line break.
    """
    return _ACTIVE.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def shortened(text: str, length: int) -> str:
    """The beginning and the end of a text that is longer than ``length``."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


class RegraftError(Exception):
    """An error of input or environment, told in one line.

    Args:
        what: What is wrong, in plain words.
        file: The file (or folder) it was found in.
        key: The tensor, module or option it concerns.
        remedy: What the user can do about it.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, file: str | Path | None = None, key: str | None = None, remedy: str | None = None
    ) -> None:
        self.what, self.file, self.key, self.remedy = what, file, key, remedy
        parts = ((file, _LONGEST_FILE), (key, _LONGEST_KEY))
        where = ": ".join(shortened(str(part), length) for part, length in parts if part is not None)
        what = shortened(what, _LONGEST_WHAT)
        line = f"{where}: {what}" if where else what
        super().__init__(printable(" ".join((f"{line}. {remedy}" if remedy else line).split())))

    @property
    def told(self) -> tuple[str, str]:
        """What is wrong and where, in full; and what to do, if anything: for a page, that escapes what it shows."""
        where = ": ".join(str(part) for part in (self.file, self.key) if part is not None)
        return f"{where}: {self.what}" if where else self.what, self.remedy or ""


class InputError(RegraftError):
    """A file that can't be read as what it should be."""


class OutputError(RegraftError):
    """A result that can't be written."""


class UsageError(RegraftError):
    """A wrong combination or value of options."""

    exit_code = 2


class Refused(RegraftError):
    """The port would not give a working adapter; ``--force`` overrides."""

    exit_code = 3


@contextmanager
def reading(file: str | Path, key: str | None = None) -> Iterator[None]:
    """Turn the libraries' errors on reading ``file`` into an `InputError` that names it."""
    try:
        yield
    except RegraftError:
        raise
    except FileNotFoundError:
        raise InputError("no such file", file=file, key=key, remedy="Check the path.") from None
    except IsADirectoryError:
        raise InputError("is a folder, not a file", file=file, key=key, remedy="Name a file in it.") from None
    except PermissionError:
        remedy = "Change its permissions, or copy it."
        raise InputError("no permission to read", file=file, key=key, remedy=remedy) from None
    except (MemoryError, OSError, ValueError, KeyError, RuntimeError, EOFError, OverflowError) as error:
        if is_full(error):
            raise
        what = f"can't be read ({first_line(error)})"
        raise InputError(what, file=file, key=key, remedy="Download or copy it again.") from error


def is_full(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a device's, or the machine's, of which torch speaks in a bare RuntimeError."""
    # By name, for torch is not imported here.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator" in str(error)


@contextmanager
def having_room(what: str, file: str | Path, remedy: str) -> Iterator[None]:
    """Turn memory that runs out inside into an `InputError` that says ``what`` was too large, and what else to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_full(error):
            raise
        raise InputError(what, file=file, remedy=remedy) from error


@contextmanager
def understanding(kind: str, file: str | Path) -> Iterator[None]:
    """The last net under a reader of ``kind``: a header may hold anything where a string or a number should be."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(
            f"is a damaged {kind} ({type(error).__name__}: {first_line(error)})",
            file=file,
            remedy="Get it again, or save it again.",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
