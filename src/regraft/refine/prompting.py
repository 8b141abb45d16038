"""What an adapter's file says of its training: prompts by tags, trigger words and model card; the pictures' size."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from regraft.adapter import Adapter
from regraft.probes.sentences import PICTURE_PROMPTS

#: Prompts that are made of tags, and the longest that is taken: metadata comes from strangers.
MOST, LONGEST = 32, 300
# Tags in one prompt, at most.
_TAGS = 6
_TRIGGERS = ("modelspec.trigger_phrase", "trigger_phrase", "trigger_words", "trigger_word", "ss_trigger_words")
_CARD = "README.md"
_BLOCK = re.compile(r"[|>][+-]?")


def picture_prompts(adapter: Adapter, given: Sequence[str] | None, seed: int = 0) -> tuple[tuple[str, ...], str]:
    """Prompts to draw pictures for, and where they come from.

    Given ones are taken alone. Otherwise those that the adapter's metadata or card tells of, two thirds, are mixed with
    general ones: what it was trained on shows most of it, and it will be asked for other things as well.

    Args:
        adapter: with the metadata of its file, and its folder's README.
        given: by the user.
        seed: of the choice of tags.
    """
    if given is not None:
        return tuple(given), f"{len(given)} given prompts"
    card, triggers, counts = _card_prompts(adapter), _triggers(adapter), _tag_counts(adapter)
    tagged = _of_tags(counts, triggers, seed)
    triggered = [f"{trigger}, {general}" for trigger in triggers for general in PICTURE_PROMPTS] if not tagged else []
    sources = {"its model card": card, "its training's tags": tagged, "its trigger words": triggered}
    own = list(dict.fromkeys(_clean([*card, *tagged, *triggered])))[:MOST]
    if not own:
        return PICTURE_PROMPTS, f"{len(PICTURE_PROMPTS)} general prompts"
    general = PICTURE_PROMPTS[: max(1, len(own) // 2)]
    told = " and ".join(source for source, found in sources.items() if found)
    return (*own, *general), f"{len(own)} prompts from {told}, and {len(general)} general ones"


def resolution_of(adapter: Adapter) -> tuple[int, int] | None:
    """Height and width of the pictures that it was trained on, where its file tells; both in multiples of 8."""
    # sd-scripts writes "(width, height)", one number, or None; the model spec width and height with an x between.
    for key in ("ss_resolution", "modelspec.resolution"):
        found = re.fullmatch(r"\(?\s*(\d{2,4})(?:\s*[,x]\s*(\d{2,4}))?\s*\)?", adapter.metadata.get(key, "").strip())
        if found is not None:
            width, height = int(found[1]), int(found[2] or found[1])
            return max(8, height // 8 * 8), max(8, width // 8 * 8)
    return None


def _tag_counts(adapter: Adapter) -> Counter[str]:
    """Tags and whole captions of the training, as sd-scripts counts them: {dataset: {tag: count}}."""
    found: Counter[str] = Counter()
    frequencies = [_parsed(adapter.metadata.get("ss_tag_frequency"))]
    datasets = _parsed(adapter.metadata.get("ss_datasets"))
    if not isinstance(frequencies[0], dict):
        parts = datasets if isinstance(datasets, list) else []
        frequencies = [part.get("tag_frequency") for part in parts if isinstance(part, dict)]
    for tags in (tags for table in frequencies if isinstance(table, dict) for tags in table.values()):
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int) and count > 0:
                found.update({str(tag).strip(): count} if str(tag).strip() else {})
    return found


def _triggers(adapter: Adapter) -> list[str]:
    """Words that the adapter answers to."""
    said = [adapter.metadata.get(key, "") for key in _TRIGGERS]
    card = _front_matter(adapter)
    return list(dict.fromkeys(_clean([*said, *_values(card, "instance_prompt")])))[:4]


def _card_prompts(adapter: Adapter) -> list[str]:
    """The examples of a model card: the texts of its widget."""
    return list(dict.fromkeys(_clean(_values(_front_matter(adapter), "text"))))


def _of_tags(counts: Counter[str], triggers: Sequence[str], seed: int) -> list[str]:
    """Prompts of one to six tags, drawn by how often they were trained on; the trigger word leads."""
    tags = [tag for tag, _ in counts.most_common(200) if tag not in triggers]
    if not tags:
        return []
    shares = torch.tensor([float(counts[tag]) for tag in tags])
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for i in range(MOST):
        size = min(1 + i % _TAGS, len(tags))
        drawn = torch.multinomial(shares, size, generator=generator).tolist()
        # The likelier tag first, as captions have it.
        prompts.append(", ".join([*triggers[:1], *(tags[j] for j in sorted(drawn))]))
    return list(dict.fromkeys(prompts))


def _parsed(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def _front_matter(adapter: Adapter) -> list[str]:
    """Lines of the YAML between the card's first two ``---``; none where there is no such card."""
    file = adapter.sidecars.get(_CARD)
    if file is None:
        return []
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            lines = stream.read(1 << 16).splitlines()
    except OSError:
        return []
    if not lines or lines[0].strip() != "---":
        return []
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), 0)
    return lines[1:end]


def _values(lines: Sequence[str], key: str) -> list[str]:
    """What stands behind a key of plain YAML, in quotes, bare, or as a block below it."""
    found = []
    for i, line in enumerate(lines):
        match = re.fullmatch(rf"(\s*(?:-\s+)?){key}:\s*(.*)", line)
        if match is None:
            continue
        value = match[2].strip()
        if not value or _BLOCK.fullmatch(value):
            value = ""
            for below in lines[i + 1 :]:
                if len(below) - len(below.lstrip()) <= len(match[1]) and below.strip():
                    break
                value += f" {below.strip()}"
        found.append(value.strip().strip("\"'"))
    return found


def _clean(texts: Iterable[str]) -> list[str]:
    """Printable, not too long, not empty."""
    plain = (" ".join("".join(c if c.isprintable() else " " for c in text).split()) for text in texts)
    return [text[:LONGEST] for text in plain if text]
