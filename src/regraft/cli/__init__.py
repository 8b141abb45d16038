"""The command line: one file per verb, thin. Each parses, calls the library, and hands a record to the sink."""

from __future__ import annotations

import importlib
import signal
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from regraft._version import __version__
from regraft.cli._sink import fail, prepare_terminal
from regraft.errors import RegraftError

#: In the order in which ``--help`` lists them; each is a module of this package with a function of the same name.
VERBS = (
    "demo",
    "inspect",
    "identify",
    "fingerprint",
    "check",
    "port",
    "batch",
    "refine",
    "bridge",
    "verify",
    "convert",
    "resize",
    "merge",
    "extract",
    "diff",
    "train",
    "push",
    "methods",
    "pairs",
    "lineage",
    "migration",
    "cache",
    "doctor",
    "ui",
    "bench",
)

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
    if hasattr(verb, "__wrapped__"):
        # The commands of a verb with sub-verbs stay with its module, and an app may be made twice.
        return verb

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except KeyboardInterrupt:
            raise Interrupted from None

    return run


def register() -> typer.Typer:
    """The app with every verb in it, once: a process may call `main` many times."""
    app.registered_commands.clear()
    app.registered_groups.clear()
    for verb in VERBS:
        module: Any = importlib.import_module(f"{__name__}.{verb}")
        if hasattr(module, "app"):
            for command in module.app.registered_commands:
                command.callback = _guarded(command.callback)
            if module.app.registered_callback is not None:
                module.app.registered_callback.callback = _guarded(module.app.registered_callback.callback)
            app.add_typer(module.app, name=verb)
        else:
            app.command(verb)(_guarded(getattr(module, verb)))
    return app


def main() -> None:
    """Console script: run the app; an error becomes one line and its exit code, never a traceback."""
    prepare_terminal()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not sys.warnoptions:
        # Libraries warn their callers, not the user; `python -W default -m regraft` shows what they say.
        warnings.simplefilter("ignore")
    try:
        register()()
    except RegraftError as error:
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, Interrupted):
        fail("interrupted: nothing is half-written", 130)
    except (MemoryError, RuntimeError) as error:
        # Imported here: `regraft --version` needs no torch.
        from regraft.hardware import said_of

        line = said_of(error)
        if line is None:
            raise
        fail(line, 1)
