"""The libraries that models are run with: there if they are installed, and quiet."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from regraft.errors import RegraftError

_DIFFUSERS = "DIFFUSERS_VERBOSITY"


def library(name: str) -> Any:
    """An optional dependency.

    Raises:
        RegraftError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise RegraftError(f"{name} is not installed", remedy="Run: pip install 'regraft[run]'") from None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers' and diffusers' reports and bars: what matters of them is raised as an error here."""
    silenced: list[tuple[Any, int, bool]] = []
    # PEFT imports it where it is there, and on a CPU it warns of kernels that it looks for on the hub.
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    told = os.environ.get(_DIFFUSERS)
    # diffusers is slow to import and may not be needed; where it is, it reads from here how loud to be.
    os.environ[_DIFFUSERS] = "critical"
    late = "diffusers" not in sys.modules
    for name in ("transformers", "diffusers"):
        # transformers speaks while diffusers imports it.
        if name not in sys.modules and (name == "diffusers" or find_spec(name) is None):
            continue
        its = import_module(f"{name}.utils.logging")
        silenced.append((its, its.get_verbosity(), bool(its.is_progress_bar_enabled())))
        its.set_verbosity(its.CRITICAL)
        its.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # They warn of their own older spellings, which we use to run with older versions of them, too.
            warnings.simplefilter("ignore")
            yield
    finally:
        bitsandbytes.setLevel(level)
        if told is None:
            del os.environ[_DIFFUSERS]
        else:
            os.environ[_DIFFUSERS] = told
        if late and "diffusers" in sys.modules:
            its = import_module("diffusers.utils.logging")
            # Within another such block it stays as quiet as that one wants it.
            silenced.append((its, its.CRITICAL if told == "critical" else its.WARNING, False))
        for its, verbosity, bars in silenced:
            its.set_verbosity(verbosity)
            if bars:
                its.enable_progress_bar()
