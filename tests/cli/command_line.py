"""The command line as typer makes it, for tests of what a text tells its reader to type."""

from __future__ import annotations

import re
from typing import Any

import typer

from regraft.cli import app

#: What a wrong option raises. Typer has a click of its own in later versions, and the installed one before.
WRONG: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


def whole() -> Any:
    """`regraft` itself."""
    return typer.main.get_command(app)


def below(command: Any) -> dict[str, Any]:
    """Its sub-verbs."""
    if not hasattr(command, "list_commands"):
        return {}
    # Those of regraft itself are loaded when they are asked for, and are in no table before.
    return {name: command.get_command(None, name) for name in command.list_commands(None)}


def verb_of(group: Any, arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that the arguments name, sub-verbs included, and the rest of them."""
    rest = list(arguments)
    while rest and rest[0] in below(group):
        group = below(group)[rest.pop(0)]
    return group, rest


def unknown_in(text: str) -> list[str]:
    """What of the `regraft …` in running text is no verb, or names an option that its verb lacks."""

    def options(command: Any) -> set[str]:
        own = {option for parameter in command.params for option in parameter.opts}
        return own.union(*(options(sub) for sub in below(command).values()))

    command, unknown = whole(), []
    for code in re.findall(r"`regraft ([^`\n]+)`", text):
        verb, rest = verb_of(command, code.split())
        named = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", " ".join(rest)))
        if (verb is command and not rest[0].startswith("-")) or not named <= options(verb):
            unknown.append(code)
    return unknown
