"""``regraft push``: an adapter to the hub, with a card that says what it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from regraft._version import __version__
from regraft.card import card
from regraft.cli import _options as o
from regraft.cli._sink import emit
from regraft.errors import InputError, UsageError, reading
from regraft.formats import load_adapter
from regraft.hub.upload import upload
from regraft.output import check_writable, write_text
from regraft.report.json_schema import parse
from regraft.report.push_schema import PushReport
from regraft.report.push_table import push_table
from regraft.report.schema import CheckReport, VerifyReport, VersionedRecord

R = TypeVar("R", bound=VersionedRecord)

_CARD = "README.md"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def push(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A file, or PEFT's folder.")],
    repo: Annotated[str | None, typer.Argument(metavar="ORG/NAME", help="The repository; made unless it is there.")] = (
        None
    ),
    card_only: Annotated[
        Path | None, typer.Option("--card", metavar="FILE.md", help="Write the card, and send nothing.")
    ] = None,
    license: Annotated[str | None, typer.Option("--license", help="As the hub calls it, such as apache-2.0.")] = None,
    pictures: Annotated[
        list[Path] | None, typer.Option("--picture", metavar="FILE", help="To show on the card; repeatable.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", help="A report of regraft's, to put beside it and link to."),
    ] = None,
    forecast: Annotated[
        Path | None,
        typer.Option("--forecast", metavar="RECORD.json", help="Show the figures of `check --json` on the card."),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            "--measured",
            metavar="RECORD.json",
            help="Likewise of `verify --json`, beside the controls; taken as given: it is not checked whose it is.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made.")] = False,
    message: Annotated[str, typer.Option("--message", "-m", help="Of the commit.")] = "Adapter and card",
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Publish an adapter beside a card: what it came from, what was carried, what was measured. Needs HF_TOKEN."""
    if (repo is None) == (card_only is None):
        raise UsageError("either ORG/NAME or --card is needed", remedy="--card writes the card alone.")
    read = load_adapter(adapter)
    files = _files(adapter)
    for picture in pictures or ():
        if picture.suffix.lower() not in _PICTURES:
            raise UsageError(f"--picture {picture} is no picture", remedy=f"One of {', '.join(_PICTURES)}.")
    beside = [*(pictures or ()), *([report] if report is not None else [])]
    for file in beside:
        if not file.is_file():
            raise InputError("no such file", file=file, remedy="Check its path.")
        if file.name in files:
            raise UsageError(f"two files are called {file.name}", remedy="Rename one of them.")
        files[file.name] = file
    title = (repo or str(adapter.resolve())).rstrip("/").rpartition("/")[2]
    text = card(
        read,
        title,
        license=license,
        pictures=[picture.name for picture in pictures or ()],
        report=report.name if report is not None else None,
        forecast=_record(CheckReport, forecast),
        measured=_record(VerifyReport, measured),
    )
    address = ""
    if card_only is not None:
        check_writable(card_only, overwrite=overwrite, source=adapter)
        write_text(text, card_only, overwrite=overwrite)
    else:
        assert repo is not None
        address = upload(repo, {**files, _CARD: text.encode()}, message, private=private)
    record = PushReport(
        regraft_version=__version__,
        adapter=str(adapter),
        repository=repo,
        files=sorted([*files, _CARD]) if repo is not None else [],
        address=address,
        outputs=[] if card_only is None else [str(card_only)],
    )
    emit(record, json=json, quiet=quiet, table=lambda console: push_table(record, console))


def _record(record_class: type[R], file: Path | None) -> R | None:
    if file is None:
        return None
    with reading(file):
        return parse(record_class, file.read_text(encoding="utf-8"), file=file)


def _files(adapter: Path) -> dict[str, Path]:
    """An adapter's own files: of a folder its weights and config, not a training's state beside them."""
    if not adapter.is_dir():
        return {adapter.name: adapter}
    found = [adapter / "adapter_config.json", *sorted(adapter.glob("adapter_model*"))]
    return {file.name: file for file in found if file.is_file()}
