"""How the hub is asked: where, whether at all, how patiently, and what its refusals are called."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, by its docs
    are_progress_bars_disabled,
    disable_progress_bars,
)

from regraft.errors import InputError, first_line

T = TypeVar("T")

#: The root of all errors of the HTTP library that huggingface_hub stands on, whichever that is.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
#: Answers that a later try may change.
BUSY = (408, 425, 429, 500, 502, 503, 504)
#: Longer than this, nobody is made to wait.
LONGEST_WAIT = 60.0
#: Seconds of silence after which a connection counts as broken.
TIMEOUT = 30.0
_FIRST_WAIT, _TRIES = 0.5, 4
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


class Unreachable(InputError):
    """The hub does not answer: what was downloaded before may do."""


def endpoint() -> str:
    """The hub's address, as the environment says it now."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def is_offline() -> bool:
    """Whether the environment forbids the network."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return constants.HF_HUB_OFFLINE or said.upper() in ("1", "ON", "YES", "TRUE")


def cache_folder() -> Path:
    """The hub's own cache, as the environment says it now."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    if "HF_HOME" in os.environ:
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    return Path(constants.HF_HUB_CACHE)


def pause(attempt: int, after: float | None = None) -> None:
    """Wait before try ``attempt`` + 1: as long as the server asked for, or twice as long each time."""
    time.sleep(min(LONGEST_WAIT, after if after is not None else _FIRST_WAIT * 2**attempt))


def retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait; None where it doesn't say."""
    text = str(headers.get("Retry-After", "")).strip()
    return float(text) if text.isdigit() else None


def patiently(call: Callable[[], T]) -> T:
    """The call's result, tried again while the hub is busy or the connection breaks."""
    for attempt in range(_TRIES):
        try:
            return call()
        except HfHubHTTPError as error:
            after = retry_after(error.response.headers)
            last = attempt == _TRIES - 1 or (after or 0) > LONGEST_WAIT
            if error.response.status_code not in BUSY or last:
                raise
            pause(attempt, after)
        except HTTP_ERROR:
            if attempt == _TRIES - 1:
                raise
            pause(attempt)
    raise AssertionError


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn the hub's errors into one that names ``what``, and keep its library from telling them too."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    # Its warnings hold signed links.
    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty() and not are_progress_bars_disabled():
        disable_progress_bars()
    try:
        yield
    except InputError:
        raise
    except (HTTP_ERROR, OSError, ValueError, RuntimeError) as error:
        raise explained(error, what) from None
    finally:
        logger.setLevel(level)


def explained(error: Exception, what: str) -> InputError:
    """One line and a remedy for an error of the hub; never its own text, which may hold a signed link or a token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"{endpoint()}/{_repo(what)}"
    terms = f"Accept its terms at {page}, then {LOGIN}."
    if isinstance(error, GatedRepoError):
        return InputError("its authors ask for consent first (gated)", file=what, remedy=terms)
    if isinstance(error, RevisionNotFoundError):
        return InputError("the hub has no such revision", file=what, remedy=f"See {page}/tree/main.")
    if isinstance(error, LocalEntryNotFoundError):
        return _unreachable(what)
    if isinstance(error, EntryNotFoundError):
        return InputError("the repository has no such file", file=what, remedy=f"See {page}/tree/main.")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        remedy = f"Check the name; if it is private, {LOGIN}."
        return InputError("is no path that exists, and no repository on the hub", file=what, remedy=remedy)
    if status == 403:
        return InputError("the hub forbids access to it", file=what, remedy=terms)
    if status == 429:
        remedy = f"Wait a while, or {LOGIN}: then more are allowed."
        return Unreachable("the hub says: too many requests", file=what, remedy=remedy)
    if status is not None:
        return Unreachable(f"the hub answers with error {status}", file=what, remedy="Try again later.")
    if isinstance(error, OfflineModeIsEnabled):
        return forbidden(what)
    if isinstance(error, HFValidationError):
        return InputError("is no name of a repository", file=what, remedy="Give org/name, or a path.")
    return (
        _unreachable(what)
        if isinstance(error, HTTP_ERROR)
        else InputError(f"can't be downloaded ({first_line(error)})", file=what)
    )


def _unreachable(what: str) -> Unreachable:
    remedy = "Check the network and HF_ENDPOINT, or give a local path."
    return Unreachable("is no path that exists, and the hub does not answer", file=what, remedy=remedy)


def forbidden(what: str) -> InputError:
    """The error for what is neither here nor allowed to be fetched."""
    return InputError(
        "is no path that exists, and was not downloaded before; HF_HUB_OFFLINE forbids to fetch it",
        file=what,
        remedy=f"Unset HF_HUB_OFFLINE, or run `hf download {_repo(what)}` where there is a network.",
    )


def _repo(what: str) -> str:
    return what.partition("@")[0].partition(":")[0]
