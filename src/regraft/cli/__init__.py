"""The command line: one file per verb, thin. Each parses, calls the library, and hands a record to the sink."""

from __future__ import annotations

import gc
import importlib
import signal
import sys
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from regraft._version import __version__
from regraft.cli._sink import fail, prepare_terminal
from regraft.errors import RegraftError

#: In the order in which ``--help`` lists them, with what it says: each is a module of this package with a function (or,
#: where it has sub-verbs, an app) of the same name, which is loaded when it is called for.
VERBS = {
    "demo": "The main job on the embedded bases; ends with a report in pictures.",
    "inspect": "Say what an adapter file is: format, model family, components, ranks.",
    "identify": "Find the base that an adapter was made for, by hashes, fingerprints and names.",
    "fingerprint": "Fingerprint a base; with two, say whether they are the same weights, or how far one drifted.",
    "check": "Will it survive? Plan and diagnostics, without an output file.",
    "port": "Carry it over: a file for the new base in the adapter's own format.",
    "batch": "Whole libraries: port or check every adapter, with each pair of bases fitted once.",
    "refine": "Bring a port the rest of the way: a short distillation on inputs that the old base makes.",
    "bridge": "Keep the old base beside the new one, and add what the adapter does to it.",
    "verify": "Did it survive? Both bases with and without their adapter on the same inputs, beside controls.",
    "convert": "Write an adapter in another file format, for the same base.",
    "resize": "Give an adapter a lower rank by SVD, or a higher one by zeros.",
    "merge": "Put several adapters for one base together, each with its weight.",
    "extract": "Make a LoRA of what a fine-tune changed: the difference of two checkpoints, cut to a rank.",
    "diff": "Compare two adapters module by module: how large, how alike, what is only in one.",
    "train": "Train an adapter on a base; its file tells which base that was, so that it can be ported later.",
    "push": "Publish an adapter beside a card: what it came from, what was carried, what was measured.",
    "methods": "What can carry an adapter, with references and needs.",
    "pairs": "Known upgrades of bases: what changes, and which tier usually applies.",
    "lineage": "Show, check or write what an adapter belongs to.",
    "migration": "Make, show, check or compose migrations of base models.",
    "cache": "List or clear the fitted migrations that are kept between runs.",
    "doctor": "Tell what is installed, which devices there are, and what a verb lacks.",
    "ui": "A page in the browser, on this machine: check, port, refine and compare without a terminal.",
    "bench": "Measure every method on pairs of bases, beside controls: recovery, retention, time.",
}


class _Verbs(TyperGroup):
    """Verbs that are loaded when they are called for: to say what there is takes no torch.

    Of click, which typer has in one version and brings inside of itself in another, no type is named here.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _load(cmd_name) if cmd_name in VERBS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


app = typer.Typer(
    name="regraft",
    cls=_Verbs,
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


@cache
def _load(verb: str) -> Any:
    module: Any = importlib.import_module(f"{__name__}.{verb}")
    # Of the same looks as the app that it belongs to.
    alone = typer.Typer(rich_markup_mode=None, callback=lambda: None)
    if hasattr(module, "app"):
        for command in module.app.registered_commands:
            command.callback = _guarded(command.callback)
        if module.app.registered_callback is not None:
            module.app.registered_callback.callback = _guarded(module.app.registered_callback.callback)
        alone.add_typer(module.app, name=verb)
    else:
        alone.command(verb)(_guarded(getattr(module, verb)))
    # What was imported stays: no collection of garbage need look at it.
    gc.freeze()
    group: Any = get_command(alone)
    return group.commands[verb]


def main() -> None:
    """Console script: run the app; an error becomes one line and its exit code, never a traceback."""
    prepare_terminal()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not sys.warnoptions:
        # Libraries warn their callers, not the user; `python -W default -m regraft` shows what they say.
        warnings.simplefilter("ignore")
    try:
        app()
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
