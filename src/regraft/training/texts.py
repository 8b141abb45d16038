"""Texts to train a language model on: read from files, and cut into examples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import InputError, first_line, reading
from regraft.runtime.load import Loaded

#: No loss is taken where this is the label, as in transformers and torch.
IGNORED = -100
_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class TextExample:
    """Token ids and what is to be foretold at each place.

    Attributes:
        ids: token ids.
        labels: the same; `IGNORED` where nothing is learnt.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class _Text:
    """One text as it was read: what is only read, and what is learnt; where it stands, for errors."""

    given: str
    learnt: str
    where: Path
    key: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()


def read_examples(path: Path, model: Loaded, context: int) -> list[TextExample]:
    """The examples of a text file, a JSON Lines file, or a folder of such.

    A ``.txt`` file is one text. A line of a ``.jsonl`` file is an object with ``text``; with ``prompt`` and
    ``completion``, of which the completion is learnt; or with ``messages``, written by the model's chat template. Texts
    that are longer than the context are cut into pieces; of a prompt that is too long the end is kept.

    Args:
        path: a file or a folder.
        model: a language model with its tokenizer.
        context: tokens at most.

    Raises:
        InputError: there is nothing to learn, a line is none of these, or the model can't read text.
    """
    if model.tokenizer is None:
        raise InputError("has no tokenizer", file=model.path, remedy="Put the tokenizer's files into its folder.")
    context = min(context, _longest(model))
    examples = [example for text in _read(path) for example in _examples(text, model.tokenizer, context)]
    if not examples:
        raise InputError("holds no text to learn from", file=path)
    return examples


def _longest(model: Loaded) -> int:
    most = getattr(model.main.config, "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else 1 << 30


def _read(path: Path) -> Iterator[_Text]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise InputError("has no .txt and no .jsonl file in it", file=path)
    for file in files:
        if file.suffix.lower() not in _SUFFIXES:
            what = "is no text that a language model could be trained on"
            raise InputError(what, file=file, remedy="Give .txt or .jsonl.")
        with reading(file):
            content = file.read_text(encoding="utf-8")
        if file.suffix.lower() == ".txt":
            yield _Text("", content, file)
            continue
        # Only at line feeds: JSON may hold other characters that Python ends lines at.
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield _of_line(line, file, number)


def _of_line(line: str, file: Path, number: int) -> _Text:
    key = f"line {number}"
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"is no JSON ({first_line(error)})", file=file, key=key) from None
    fields = found if isinstance(found, dict) else {}
    if isinstance(fields.get("text"), str):
        return _Text("", fields["text"], file, key)
    if isinstance(fields.get("prompt"), str) and isinstance(fields.get("completion"), str):
        return _Text(fields["prompt"], fields["completion"], file, key)
    messages = fields.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return _Text("", "", file, key, tuple(messages))
    raise InputError("has neither text, nor prompt and completion, nor messages", file=file, key=key)


def _examples(text: _Text, tokenizer: Any, context: int) -> Iterator[TextExample]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if text.messages:
        try:
            ids = tokenizer.apply_chat_template(list(text.messages), tokenize=True, return_dict=False)
        except Exception as error:
            what = f"the tokenizer can't write its messages ({first_line(error)})"
            remedy = "Give text, or prompt and completion."
            raise InputError(what, file=text.where, key=text.key, remedy=remedy) from error
        yield from _pieces(ids, context)
        return
    if not text.given:
        yield from _pieces([*_ids(tokenizer, text.learnt), *end], context)
        return
    learnt = [*_ids(tokenizer, text.learnt, special=False), *end][: context - 1]
    if not learnt:
        # Without a token for the end there is nothing to say.
        return
    given = _ids(tokenizer, text.given)[-(context - len(learnt)) :]
    yield TextExample((*given, *learnt), (*[IGNORED] * len(given), *learnt))


def _ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    # A tokenizer warns of texts beyond its length; they are cut here.
    found: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return found


def _pieces(ids: Sequence[int], context: int) -> Iterator[TextExample]:
    """A text in pieces of the context; a rest of one token has nothing to foretell."""
    for i in range(0, len(ids), context):
        piece = tuple(ids[i : i + context])
        if len(piece) > 1:
            yield TextExample(piece, piece)
