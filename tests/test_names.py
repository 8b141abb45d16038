from __future__ import annotations

from regraft.names import resolve_names

LLAMA = [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "v_proj")]
BERT = [f"encoder.layer.{i}.attention.self.{p}" for i in range(2) for p in ("query", "value")]
CLIP = [f"encoder.layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "v_proj")]


def test_equal_names_are_themselves() -> None:
    assert resolve_names(LLAMA, [*LLAMA, "lm_head"]) == {name: name for name in LLAMA}


def test_a_common_prefix_is_stripped() -> None:
    assert resolve_names([f"bert.{n}" for n in BERT], BERT) == {f"bert.{n}": n for n in BERT}


def test_a_common_prefix_is_added() -> None:
    assert resolve_names(BERT, [f"bert.{n}" for n in BERT] + ["classifier"]) == {n: f"bert.{n}" for n in BERT}


def test_a_prefix_of_two_levels_is_added() -> None:
    assert resolve_names(BERT, [f"model.bert.{n}" for n in BERT]) == {n: f"model.bert.{n}" for n in BERT}


def test_the_text_model_level_may_be_missing_on_either_side() -> None:
    old = [f"text_model.{n}" for n in CLIP]
    assert resolve_names(old, CLIP) == dict(zip(old, CLIP, strict=True))
    assert resolve_names(CLIP, old) == dict(zip(CLIP, old, strict=True))
    below = [f"text_encoder.text_model.{n}" for n in CLIP]
    assert resolve_names(below, CLIP) == dict(zip(below, CLIP, strict=True))
    assert resolve_names(CLIP, below) == dict(zip(CLIP, below, strict=True))


def test_what_is_in_neither_is_none() -> None:
    assert resolve_names(["bert.encoder.x", "bert.head"], ["encoder.x"]) == {
        "bert.encoder.x": "encoder.x",
        "bert.head": None,
    }
    assert resolve_names([], ["a"]) == {}
    assert resolve_names(["a"], []) == {"a": None}


def test_a_numbered_block_never_becomes_another() -> None:
    wanted = ["encoder.layer.5.attention.self.query", "encoder.layer.5.attention.self.value"]
    assert resolve_names(wanted, BERT) == dict.fromkeys(wanted)
    assert resolve_names(["attention.self.query"], BERT) == {"attention.self.query": None}


def test_a_draw_between_prefixes_is_not_guessed() -> None:
    available = ["vision.layers.0.q", "language.layers.0.q"]
    assert resolve_names(["layers.0.q"], available) == {"layers.0.q": None}


def test_the_prefix_that_finds_the_most_wins() -> None:
    available = ["a.x.0", "b.x.0", "b.x.1"]
    assert resolve_names(["x.0", "x.1"], available) == {"x.0": "b.x.0", "x.1": "b.x.1"}


def test_an_equal_name_wins_and_no_name_is_given_twice() -> None:
    assert resolve_names(["bert.x", "bert.y", "x"], ["x", "y"]) == {"bert.x": None, "bert.y": "y", "x": "x"}


def test_names_beside_the_prefix_keep_their_own() -> None:
    wanted = ["bert.encoder.x", "bert.encoder.y", "classifier"]
    assert resolve_names(wanted, ["encoder.x", "encoder.y", "classifier"]) == {
        "bert.encoder.x": "encoder.x",
        "bert.encoder.y": "encoder.y",
        "classifier": "classifier",
    }
