"""The command line: one file per verb, thin. Each parses, calls the library, and hands a record to the sink."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from regraft._version import __version__
from regraft.cli._sink import fail, prepare_terminal
from regraft.errors import RegraftError

#: In the order in which ``--help`` lists them; each is a module of this package with a function of the same name.
VERBS = ("demo", "inspect", "check", "port", "verify", "convert", "methods", "cache")

app = typer.Typer(
    name="regraft",
    help="Will a LoRA survive an upgrade of its base model? Carry it over, and measure what survived.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"regraft {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


class Interrupted(Exception):
    """Ctrl-C or SIGTERM inside of a verb: typer would answer a `KeyboardInterrupt` with words of its own."""


def _guarded(verb: Callable[..., None]) -> Callable[..., None]:
    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except KeyboardInterrupt:
            raise Interrupted from None

    return run


def register() -> typer.Typer:
    """The app with every verb in it."""
    for verb in VERBS:
        module: Any = importlib.import_module(f"{__name__}.{verb}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=verb)
        else:
            app.command(verb)(_guarded(getattr(module, verb)))
    return app


def main() -> None:
    """Console script: run the app; an error becomes one line and its exit code, never a traceback."""
    prepare_terminal()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        register()()
    except RegraftError as error:
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, Interrupted):
        fail("interrupted: nothing was written", 130)
    except MemoryError:
        fail("not enough memory for this; close other programs, or leave modules out with --exclude", 1)
