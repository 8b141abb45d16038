"""The one small family of errors. Each says what is wrong, where, and what to do next.

The command line prints ``str(error)`` as one line and exits with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        where = ": ".join(str(part) for part in (file, key) if part is not None)
        line = f"{where}: {what}" if where else what
        super().__init__(" ".join((f"{line}. {remedy}" if remedy else line).split()))


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
        raise InputError("is a folder, not a file", file=file, key=key) from None
    except PermissionError:
        raise InputError("no permission to read", file=file, key=key) from None
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise InputError(f"can't be read ({first_line(error)})", file=file, key=key) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
