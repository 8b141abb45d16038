"""What a person has chosen on the page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from regraft.errors import UsageError

# Files in a base's folder that a file picker can point at, since it shows files alone.
_OF_FOLDER = ("model_index.json", "config.json")


@dataclass(frozen=True)
class Asked:
    """One adapter, two bases, and how it is to come out. Plain values: it travels to another process.

    Attributes:
        lora: path or hub id.
        old: likewise, of the base that it was trained on.
        new: of the base that it is to run on.
        out: folder for what is written.
        device: ``cpu``, ``cuda`` or ``mps``.
        method: of the port.
        strength: factor on the whole update.
        rank: of the output, as `regraft.asked.wanted_rank` reads it.
        format: of the output; empty for the input's.
        force: port against a refusal.
        private: keep paths, names and tag lists in the output.
        prompts: to draw or run; empty for those that the old base makes itself.
    """

    lora: str
    old: str
    new: str
    out: str
    device: str = "cpu"
    method: str = "auto"
    strength: float = 1.0
    rank: str = "keep"
    format: str = ""
    force: bool = False
    private: bool = True
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, what in (("lora", "The LoRA"), ("old", "The old base"), ("new", "The new base")):
            if not getattr(self, name):
                raise UsageError(f"{what} is missing", remedy="Choose it above.")

    @property
    def subject(self) -> tuple[str, str, str]:
        """What is carried from where to where."""
        return self.lora, self.old, self.new

    @property
    def bases(self) -> tuple[Path, Path]:
        """Old and new."""
        return Path(self.old), Path(self.new)


def cleaned(text: str | None) -> str:
    """A path as people paste it: without quotes and spaces around it, ``~`` opened, ``file://`` taken off."""
    plain = (text or "").strip().strip("\"'").strip()
    if plain.startswith("file:"):
        # As file managers copy it, with %20 for a space.
        plain = url2pathname(urlsplit(plain).path)
    return str(Path(os.path.expanduser(plain))) if plain else ""


def base_of(picked: str) -> str:
    """The base that a picked file belongs to: its folder, where the file only describes that."""
    path = Path(picked)
    return str(path.parent) if path.name in _OF_FOLDER else picked


def prompts_of(text: str | None) -> tuple[str, ...]:
    """One prompt a line; empty lines are passed over."""
    return tuple(line.strip() for line in (text or "").splitlines() if line.strip())
