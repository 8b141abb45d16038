"""Known pairs: what the data says of a pair is what the two families' tables differ in."""

from __future__ import annotations

import json
import re

import pytest
from running import Run

from regraft.families import families, get_family
from regraft.pairs import Pair, difference, known, pairs


def by_name(name: str) -> Pair:
    return next(pair for pair in pairs() if pair.name == name)


def main_of(name: str) -> str:
    family = get_family(name)
    assert family is not None
    return family.main


@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: pair.name)
def test_a_pair_is_of_known_families_and_says_what_changes(pair: Pair) -> None:
    assert pair.old in families()
    assert pair.new in families()
    assert pair.changes
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+ → [\w.-]+/[\w.-]+", example) for example in pair.examples)


def test_names_of_pairs_are_unique() -> None:
    assert len({pair.name for pair in pairs()}) == len(pairs())


@pytest.mark.parametrize("pair", [p for p in pairs() if p.widened], ids=lambda pair: pair.name)
def test_widened_inputs_are_all_that_the_tables_show_as_reshaped(pair: Pair) -> None:
    found = difference(pair.old, pair.new, main_of(pair.old))
    assert found is not None
    assert {path: (old[1], new[1]) for path, (old, new) in found.reshaped.items()} == dict(pair.widened)
    assert all(old[0] == new[0] and old[2:] == new[2:] for old, new in found.reshaped.values())


@pytest.mark.parametrize("pair", [p for p in pairs() if not p.widened and p.tier == "port"], ids=lambda pair: pair.name)
def test_a_port_between_other_pairs_keeps_every_shape(pair: Pair) -> None:
    found = difference(pair.old, pair.new, main_of(pair.old))
    assert found is None or not found.reshaped


def test_a_bridge_is_needed_where_the_tables_fit_nowhere() -> None:
    found = difference("sd15", "sdxl", "unet")
    assert found is not None
    assert len(found.reshaped) + len(found.removed) > 100


def test_ssd1b_is_sdxl_with_blocks_taken_out() -> None:
    found = difference("sdxl", "ssd1b", "unet")
    assert found is not None
    assert not found.added
    assert not found.reshaped
    gone = {path for path in found.removed if path.startswith("mid_block.")}
    assert any(path.startswith("mid_block.attentions.") for path in gone)
    depths = [
        len(
            {
                p.split(".")[5]
                for p in get_family("ssd1b").tables["unet"]
                if p.startswith(f"up_blocks.0.attentions.{i}.t")
            }
        )
        for i in range(3)
    ]
    assert depths == [4, 4, 10]


def test_wan_22_takes_one_file_into_two_experts() -> None:
    pair = known("wan", "wan22")
    assert pair is not None
    assert pair.components == {"transformer": ("transformer", "transformer_2")}
    new = get_family("wan22")
    assert new is not None
    assert {*pair.components["transformer"]} <= set(new.components)


def test_a_pair_is_found_by_its_families_or_their_ancestors() -> None:
    assert known("sdxl", "pony") == by_name("sdxl-pony")
    assert known("illustrious", "noobai") == by_name("illustrious-noobai")
    assert known("pony", "ssd1b") == by_name("sdxl-ssd1b")
    assert known("pony", "illustrious") == by_name("sdxl-illustrious")
    assert known("pony", "pony") == by_name("sdxl-finetunes")
    assert known("sd15", "flux") is None
    assert known(None, "sdxl") is None


def test_the_verb_lists_every_pair(run: Run) -> None:
    listed = json.loads(run("pairs", "--json").out)
    assert [entry["name"] for entry in listed] == [pair.name for pair in pairs()]
    assert {"from", "to", "tier", "changes", "widened", "components", "examples"} <= set(listed[0])
    assert "SSD-1B" in run("pairs").out
