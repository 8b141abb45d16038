"""The world of language models: what it trains can be opened, applied and scored, and is trained once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import peft
import pytest
import torch

from regraft.base import open_base
from regraft.bench import language
from regraft.bench.language import LanguageWorld
from regraft.bench.language_models import CONTEXT, Size, deepened, pruned, widened
from regraft.bench.language_recipes import ADAPTERS, BASES, DEV, DEV_PAIRS, PAIRS, THIRD, BaseRecipe, as_it_is
from regraft.bench.language_text import CHARACTERS, DOMAINS, split
from regraft.bench.language_train import AdapterRecipe, Course, TunerRecipe, losses
from regraft.errors import InputError
from regraft.formats import load_adapter
from regraft.runtime import load_model

COURSE = Course(steps=2, rate=1e-2, batch=2)
TOY_BASES = {
    "v1": BaseRecipe(COURSE, ("a", "b"), size=Size(width=16, layers=3, mlp=24, heads=2)),
    "drift-1": BaseRecipe(COURSE, ("a", "b", "films"), made=partial(as_it_is)),
    "pruned": BaseRecipe(COURSE, ("a",), made=partial(pruned, removed=(1,)), distilled=True),
    "wider": BaseRecipe(COURSE, ("a",), made=partial(widened, channels=8, heads=1, units=12, seed=0)),
    "deeper": BaseRecipe(COURSE, ("a",), made=partial(deepened, copied=(1,))),
    "scratch": BaseRecipe(COURSE, ("a",), size=Size(width=8, layers=2, mlp=24, heads=2)),
    "tokenizer": BaseRecipe(COURSE, ("a", "b"), made=partial(as_it_is), tokens=110),
}
TOY_ADAPTERS = {
    "plain": AdapterRecipe("task", 2, course=COURSE),
    "dora": AdapterRecipe("task", 2, ("q_proj", "v_proj"), dora=True, course=COURSE),
    "foura": TunerRecipe("task", 2, course=COURSE, kind="foura", options=(("r", 2), ("foura_alpha", 4))),
    "lorax": TunerRecipe("task", 2, ("q_proj", "v_proj"), course=COURSE, kind="lorax"),
}


def text(name: str):
    return split(f"some words of {name}: {sorted(name)}\n" * 200)


def toy_world(cache) -> LanguageWorld:
    pairs = tuple(replace(spec, adapters=tuple(TOY_ADAPTERS), seeds=(0,)) for spec in PAIRS)
    pairs = tuple(spec for spec in pairs if spec.name.removeprefix("lm-") in TOY_BASES)
    return LanguageWorld(cache, bases=TOY_BASES, adapters=TOY_ADAPTERS, pairs=pairs, text=text)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> LanguageWorld:
    return toy_world(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def _few_windows(monkeypatch):
    monkeypatch.setattr(language, "WINDOWS", 4)


@pytest.mark.parametrize("name", [name for name in TOY_BASES if name != "v1"])
def test_every_new_base_opens_and_scores(world, name):
    pair = f"lm-{name}"
    folder = world.base(pair, "new")
    assert {"model"} == set(open_base(folder).components)
    model = load_model(folder)
    assert model.kind == "language"
    assert model.tokenizer.decode(model.tokenizer("a = 1\n  b")["input_ids"]) == "a = 1\n  b"
    assert (len(model.tokenizer) > len(CHARACTERS)) is bool(TOY_BASES[name].tokens)
    with world.scorer(pair, "new", "plain") as score:
        scores = score(None)
    assert scores.task.shape == scores.retention.shape == (4,)
    # About ln 96 nats a character: hardly trained, and of any tokenizer alike.
    assert -5.5 < scores.task.mean() < -2


def test_the_old_base_is_the_same_for_every_pair(world):
    assert world.base("lm-drift-1", "old") == world.base("lm-pruned", "old")
    assert world.adapter("lm-drift-1", "plain", 0) == world.adapter("lm-pruned", "plain", 0)


@pytest.mark.parametrize("name", list(TOY_ADAPTERS))
def test_an_adapter_scores_as_peft_runs_it(world, name):
    folder = world.adapter("lm-drift-1", name, 0)
    model = load_model(world.base("lm-drift-1", "old"))
    task, third = (text(domain).windows(4, CONTEXT) for domain in ("task", THIRD))
    with world.scorer("lm-drift-1", "old", name) as score:
        bare, scored, again = score(None), score(load_adapter(folder)), score(None)
    judge = peft.PeftModel.from_pretrained(model.main, str(folder)).eval()
    for scores, windows in ((scored.task, task), (scored.retention, third)):
        np.testing.assert_allclose(-scores, losses(judge, model.tokenizer, windows).numpy(), atol=1e-5)
    assert not np.allclose(scored.task, bare.task, atol=1e-5)
    assert np.array_equal(bare.task, again.task)
    assert np.array_equal(bare.retention, again.retention)


def test_a_native_adapter_is_trained_on_the_new_base(world):
    folder = world.native("lm-pruned", "plain", 0)
    layers = {ref.path.split(".")[2] for ref in load_adapter(folder).updates}
    assert layers == {"0", "1"}
    assert world.record(folder)["gain"] == pytest.approx(
        world.record(folder)["before"] - world.record(folder)["after"], abs=1e-6
    )


def test_seeds_give_different_adapters(world):
    one, other = (load_adapter(world.adapter("lm-drift-1", "plain", seed)) for seed in (0, 101))
    ref = next(iter(one.updates))
    assert not torch.equal(one.updates[ref].delta(), other.updates[ref].delta())


def test_training_again_gives_the_same_bytes_and_only_when_something_is_missing(world, tmp_path):
    folder = world.base("lm-drift-1", "new")
    file = folder / "model.safetensors"
    stamp = file.stat().st_mtime_ns
    assert world.base("lm-drift-1", "new") == folder
    assert file.stat().st_mtime_ns == stamp
    again = toy_world(tmp_path).base("lm-drift-1", "new")
    assert (again / "model.safetensors").read_bytes() == file.read_bytes()


def test_another_recipe_has_another_folder(world, tmp_path):
    other = {**TOY_BASES, "v1": replace(TOY_BASES["v1"], course=Course(steps=1, rate=1e-2, batch=2))}
    again = LanguageWorld(tmp_path, bases=other, adapters=TOY_ADAPTERS, pairs=world.pairs, text=text)
    for name in TOY_BASES:
        # What starts from another v1 is another base, too; the one from scratch does not.
        assert (world._called(name) == again._called(name)) is (name == "scratch")
    assert len({recipe.digest for recipe in BASES.values()}) == len(BASES)


def test_what_is_cut_short_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise KeyboardInterrupt

    world = toy_world(tmp_path)
    monkeypatch.setattr(language, "train", broken)
    with pytest.raises(KeyboardInterrupt):
        world.base("lm-scratch", "new")
    assert not [p for p in (tmp_path / "language" / "bases").iterdir() if p.is_dir()]


def test_only_a_distilled_base_has_a_teacher(tmp_path, monkeypatch):
    taught: list[bool] = []
    monkeypatch.setattr(language, "train", lambda *_, teacher=None, **__: taught.append(teacher is not None))
    world = toy_world(tmp_path)
    for which in ("old", "new"):
        world.base("lm-pruned", which)
    world.base("lm-deeper", "new")
    assert taught == [False, True, False]


def test_make_trains_all_of_a_pair(tmp_path):
    made: list[str] = []
    toy_world(tmp_path).make(["lm-drift-1"], made.append)
    assert len(set(made)) == len(made) == 2 * len(TOY_ADAPTERS)
    bases = [p.name.rpartition("-")[0] for p in (tmp_path / "language" / "bases").iterdir() if p.is_dir()]
    assert sorted(bases) == ["drift-1", "v1"]


def test_the_record_tells_drift_and_losses(world):
    notes = world.record(world.base("lm-drift-1", "new"))
    assert 0 < notes["drift"] < 1
    assert set(notes["held_out"]) == {"python", "news", "films"}
    assert world.record(world.base("lm-scratch", "new"))["drift"] is None


@pytest.mark.parametrize("call", [lambda w: w.base("sd-near", "old"), lambda w: w.adapter("lm-pruned", "no", 0)])
def test_an_unknown_name_is_told_with_the_known_ones(world, call):
    with pytest.raises(InputError, match=r"named .* Known: "):
        call(world)


def test_the_table_has_what_the_benchmark_asks_for():
    assert {spec.relation for spec in PAIRS} == {"drift", "pruned", "wider", "deeper", "scratch", "tokenizer"}
    assert sum(spec.relation == "drift" for spec in PAIRS) == 3
    assert [spec.name for spec in PAIRS if spec.seeds == (0, 1, 2)] == ["lm-drift-2", "lm-pruned"]
    for spec in PAIRS:
        assert spec.name.removeprefix("lm-") in BASES
        assert len(spec.adapters) >= 3
        assert set(spec.adapters) <= set(ADAPTERS)
        assert not set(spec.adapters) & set(DEV)
    assert set(DEV_PAIRS) <= {spec.name for spec in PAIRS}
    assert {recipe.domain for recipe in ADAPTERS.values()} <= set(DOMAINS)


def test_no_reported_adapters_text_is_tuned_on_or_known_to_a_base():
    tuned = {ADAPTERS[name].domain for name in DEV}
    reported = {ADAPTERS[name].domain for name in ADAPTERS if name not in DEV}
    assert not tuned & reported
    assert not (tuned | reported) & {domain for recipe in BASES.values() for domain in recipe.domains}
