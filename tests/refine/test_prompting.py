"""Prompts come from what the adapter's own file tells of its training; the user's own win."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regraft import Adapter
from regraft.probes.sentences import PICTURE_PROMPTS
from regraft.refine.prompting import LONGEST, MOST, picture_prompts, resolution_of

TAGS = {"10_cats": {"cat": 40, "sleeping": 4, "sofa": 2}, "5_dogs": {"dog": 9}}


def adapter(metadata: dict[str, str] | None = None, card: Path | None = None) -> Adapter:
    return Adapter({}, format="kohya", metadata=metadata or {}, sidecars={"README.md": card} if card else {})


def card(folder: Path, front: str) -> Path:
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Words\ninstance_prompt: not this\n", encoding="utf-8")
    return folder / "README.md"


def test_given_prompts_win() -> None:
    prompts, told = picture_prompts(adapter({"ss_tag_frequency": json.dumps(TAGS)}), ["mine"])
    assert prompts == ("mine",)
    assert told == "1 given prompts"


def test_without_any_word_of_the_training_they_are_general() -> None:
    assert picture_prompts(adapter(), None) == (PICTURE_PROMPTS, f"{len(PICTURE_PROMPTS)} general prompts")


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_tag_frequency": json.dumps(TAGS)},
        {"ss_datasets": json.dumps([{"tag_frequency": TAGS, "batch_size_per_device": 2}])},
    ],
    ids=["ss_tag_frequency", "ss_datasets"],
)
def test_tags_of_the_training_are_drawn_by_how_often_they_came(metadata: dict[str, str]) -> None:
    prompts, told = picture_prompts(adapter(metadata), None)
    own = [prompt for prompt in prompts if prompt not in PICTURE_PROMPTS]
    known = {tag for tags in TAGS.values() for tag in tags}
    assert own
    assert all(set(prompt.split(", ")) <= known for prompt in own)
    assert sum("cat" in prompt for prompt in own) > sum("sofa" in prompt for prompt in own)
    assert "its training's tags" in told
    # Two of its own to one general one.
    assert len(prompts) - len(own) == len(own) // 2


def test_trigger_words_lead_every_prompt_of_the_adapters_own() -> None:
    said = {"modelspec.trigger_phrase": "sks style"}
    prompts, told = picture_prompts(adapter(said), None)
    assert sum(prompt.startswith("sks style, ") for prompt in prompts) == len(PICTURE_PROMPTS)
    assert "trigger words" in told
    tagged, _ = picture_prompts(adapter({**said, "ss_tag_frequency": json.dumps(TAGS)}), None)
    assert all(prompt.startswith("sks style, ") for prompt in tagged if prompt not in PICTURE_PROMPTS)


def test_a_model_card_tells_its_instance_prompt_and_its_examples(tmp_path: Path) -> None:
    front = (
        "base_model: some/base\ninstance_prompt: 'photo of TOK dog'\nwidget:\n- text: TOK dog in a bucket\n"
        "  output:\n    url: image_0.png\n- text: >-\n    TOK dog\n    on the moon\n  output:\n    url: image_1.png"
    )
    prompts, told = picture_prompts(adapter(card=card(tmp_path, front)), None)
    assert prompts[:2] == ("TOK dog in a bucket", "TOK dog on the moon")
    assert any(prompt.startswith("photo of TOK dog, ") for prompt in prompts)
    assert not any("not this" in prompt for prompt in prompts)
    assert told.startswith(f"{sum(p not in PICTURE_PROMPTS for p in prompts)} prompts from its model card and")


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_tag_frequency": "{"},
        {"ss_tag_frequency": "[1, 2]"},
        {"ss_tag_frequency": json.dumps({"a": ["cat"]})},
        {"ss_tag_frequency": json.dumps({"a": {"cat": "often", "": 3, "dog": -1}})},
        {"ss_tag_frequency": "[" * 100_000},
        {"ss_datasets": json.dumps({"tag_frequency": 1})},
        {"modelspec.trigger_phrase": " \n\t "},
    ],
)
def test_metadata_that_makes_no_sense_is_as_none(metadata: dict[str, str]) -> None:
    assert picture_prompts(adapter(metadata), None)[0] == PICTURE_PROMPTS


def test_a_strangers_metadata_is_cut_and_cleaned() -> None:
    long = {f"tag {i} \x1b[31m" + "x" * 1000: 1 for i in range(1000)}
    prompts, _ = picture_prompts(adapter({"ss_tag_frequency": json.dumps({"d": long})}), None)
    assert len(prompts) <= MOST + MOST // 2
    assert all(len(prompt) <= LONGEST and prompt.isprintable() for prompt in prompts)


@pytest.mark.parametrize(
    ("metadata", "size"),
    [
        ({"ss_resolution": "(512, 768)"}, (768, 512)),
        ({"ss_resolution": "1024"}, (1024, 1024)),
        ({"modelspec.resolution": "1024x768"}, (768, 1024)),
        ({"ss_resolution": "None", "modelspec.resolution": "513x520"}, (520, 512)),
        ({"ss_resolution": "(99999999, 1)"}, None),
        ({}, None),
    ],
)
def test_pictures_are_drawn_at_the_size_that_the_adapter_was_trained_at(
    metadata: dict[str, str], size: tuple[int, int] | None
) -> None:
    assert resolution_of(adapter(metadata)) == size
