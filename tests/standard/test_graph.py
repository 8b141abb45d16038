"""A folder of migrations as a graph: one way is taken, and everything else is said plainly."""

from __future__ import annotations

import shutil
from itertools import pairwise, permutations
from pathlib import Path

import pytest
from running import Run
from safetensors.torch import load_file, save_file

from regraft import InputError, fit_migration, load_adapter, open_base
from regraft.lineage import lineage_of, ports_of
from regraft.lineage.model import BaseId
from regraft.lineage.stamp import stamp
from regraft.migrations.graph import Edge, Graph, cycles, find_way, read_graph
from regraft.migrations.model import Header
from regraft.migrations.recognise import recognise
from toys import drifted, llama, lora, save_base

VERSIONS = ("v1", "v2", "v3", "v4")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases v1 to v4, every migration between neighbours, and an adapter of v1 that says so."""
    folder = tmp_path_factory.mktemp("store")
    state = llama(layers=1)
    for number, name in enumerate(VERSIONS):
        save_base(state, folder / f"{name}.safetensors")
        state = drifted(state, 0.05, seed=number)
    bases = {name: open_base(folder / f"{name}.safetensors") for name in VERSIONS}
    for old, new in [("v1", "v2"), ("v2", "v3"), ("v3", "v4"), ("v1", "v3"), ("v1", "v4"), ("v3", "v1"), ("v2", "v4")]:
        fit_migration(bases[old], bases[new], "copy").save(folder / f"{old}-{new}.safetensors")
    lora(llama(layers=1)).save(folder / "plain")
    stamp(folder / "plain", bases["v1"], folder / "lora")
    return folder


@pytest.fixture
def graph(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a folder of the named migrations and steps into the folder above it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ms").mkdir()

    def make(*names: str) -> Path:
        for name in names:
            shutil.copyfile(store / f"{name}.safetensors", tmp_path / "ms" / f"{name}.safetensors")
        return tmp_path / "ms"

    return make


def port_to(run: Run, store: Path, goal: str, *more: str):
    return run("port", store / "lora", "--to", store / f"{goal}.safetensors", "--migrations", "ms", "-o", "out", *more)


def test_the_one_way_is_shown_applied_and_recorded(store: Path, graph, run: Run) -> None:
    graph("v1-v2", "v2-v3", "v3-v4")
    ran = port_to(run, store, "v4", "--json")
    assert ran.code == 0
    assert "Way: v1.safetensors → v2.safetensors → v3.safetensors → v4.safetensors" in ran.err
    assert [Path(file).name for file in ran.record["path"]] == [f"{a}-{b}.safetensors" for a, b in steps("v4")]
    ported = load_adapter("out")
    (port,) = ports_of(ported)
    assert [base["name"] for base in port["via"]] == ["v2.safetensors", "v3.safetensors"]
    assert len(port["migrations"]) == 3
    assert lineage_of(ported)["base"]["fingerprint"] == open_base(store / "v4.safetensors").fingerprint
    # Copies all the way: the tensors are the adapter's own.
    before, after = (load_file(p / "adapter_model.safetensors") for p in (store / "lora", Path("out")))
    assert all(before[key].equal(after[key]) for key in before)


def steps(goal: str) -> list[tuple[str, str]]:
    names = VERSIONS[: VERSIONS.index(goal) + 1]
    return list(pairwise(names))


def test_neither_base_need_be_at_hand(store: Path, graph, run: Run) -> None:
    graph("v1-v2", "v2-v3")
    goal = open_base(store / "v3.safetensors").fingerprint
    ran = run("port", store / "lora", "--to-fingerprint", goal, "--migrations", "ms", "-o", "out", "--json")
    assert ran.code == 0
    assert ran.record["to"]["fingerprint"] == goal


def test_the_shortest_way_wins(store: Path, graph, run: Run) -> None:
    graph("v1-v2", "v2-v3", "v3-v4", "v1-v4")
    ran = port_to(run, store, "v4", "--json")
    assert [Path(file).name for file in ran.record["path"]] == ["v1-v4.safetensors"]


def test_two_shortest_ways_are_listed_and_one_is_chosen_by_via(store: Path, graph, run: Run) -> None:
    graph("v1-v2", "v2-v4", "v1-v3", "v3-v4")
    ran = port_to(run, store, "v4")
    assert ran.code == 2
    assert "2 ways of 2 steps" in ran.err
    assert "v1.safetensors → v2.safetensors → v4.safetensors (v1-v2.safetensors, v2-v4.safetensors)" in ran.err
    assert "v1.safetensors → v3.safetensors → v4.safetensors (v1-v3.safetensors, v3-v4.safetensors)" in ran.err
    assert "--via" in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert not Path("out").exists()
    for wish in ("v2-v4", "v2-v4.safetensors", "v2.safetensors", open_base(store / "v2.safetensors").fingerprint[:12]):
        chosen = port_to(run, store, "v4", "--via", wish, "--dry-run")
        assert chosen.code == 0
        assert "v2.safetensors → v4" in chosen.err


def test_via_may_ask_for_a_longer_way_but_not_for_an_unknown_one(store: Path, graph, run: Run) -> None:
    graph("v1-v2", "v2-v4", "v1-v4")
    assert "(v1-v4.safetensors)" in port_to(run, store, "v4", "--dry-run").err
    assert "(v1-v2.safetensors, v2-v4.safetensors)" in port_to(run, store, "v4", "--dry-run", "--via", "v2-v4").err
    unknown = port_to(run, store, "v4", "--via", "v7")
    assert unknown.code == 2
    assert "'v7' names no migration or base" in unknown.err


def test_equal_files_under_two_names_are_one(store: Path, graph, run: Run) -> None:
    folder = graph("v1-v2")
    shutil.copyfile(folder / "v1-v2.safetensors", folder / "again.safetensors")
    assert port_to(run, store, "v2").code == 0


def test_no_way_says_how_far_it_leads(store: Path, graph, run: Run) -> None:
    graph("v1-v2", "v3-v4")
    broken = port_to(run, store, "v4")
    assert broken.code == 1
    assert "it breaks off: v1.safetensors leads to v2.safetensors; v4.safetensors follows v3.safetensors" in broken.err
    nowhere = port_to(run, store, "v3")
    assert nowhere.code == 1
    assert "no migration ends at v3.safetensors" in nowhere.err
    assert "of the same architecture" in nowhere.err
    backwards = run(
        "port", store / "lora", "--from", store / "v4.safetensors", "--to", store / "v1.safetensors",
        "--migrations", "ms", "-o", "out",
    )  # fmt: skip
    assert backwards.code == 1
    assert "no migration begins at v4.safetensors" in backwards.err


def test_a_cycle_does_no_harm_and_is_shown(store: Path, graph, run: Run) -> None:
    folder = graph("v1-v2", "v2-v3", "v3-v1", "v3-v4")
    assert port_to(run, store, "v4").code == 0
    shown = run("migration", "show", "ms")
    assert "Cycle: v1.safetensors → v2.safetensors → v3.safetensors → v1.safetensors" in shown.out
    (ring,) = cycles(read_graph(folder))
    assert [base.name for base in ring] == ["v1.safetensors", "v2.safetensors", "v3.safetensors"]


def test_the_adapters_own_base_as_goal_is_said(store: Path, graph, run: Run) -> None:
    graph("v1-v2")
    ran = port_to(run, store, "v1")
    assert ran.code == 1
    assert "is for v1.safetensors already" in ran.err


def test_a_damaged_file_is_named_and_the_others_are_used(store: Path, graph, run: Run) -> None:
    folder = graph("v1-v2", "v2-v3")
    (folder / "cut.safetensors").write_bytes((folder / "v2-v3.safetensors").read_bytes()[:1000])
    fine = port_to(run, store, "v2")
    assert fine.code == 0
    assert "Left out: ms/cut.safetensors: is truncated" in fine.err
    (folder / "v2-v3.safetensors").unlink()
    ran = port_to(run, store, "v3", "--quiet", "--overwrite")
    assert ran.code == 1
    assert "1 damaged files were left out (ms/cut.safetensors: is truncated" in ran.err


def test_a_folder_without_migrations_is_said(store: Path, graph, run: Run) -> None:
    graph()
    shutil.copyfile(store / "v1.safetensors", "ms/base.safetensors")
    empty = port_to(run, store, "v2")
    assert (empty.code, "holds no migration" in empty.err) == (1, True)
    missing = run("port", store / "lora", "--to", store / "v2.safetensors", "--migrations", "nowhere", "-o", "out")
    assert (missing.code, "is no folder" in missing.err) == (1, True)


def test_an_adapter_without_lineage_is_told_of_stamp(store: Path, graph, run: Run) -> None:
    graph("v1-v2")
    goal = ("--to", store / "v2.safetensors", "--migrations", "ms", "-o", "out")
    ran = run("port", store / "plain", *goal)
    assert ran.code == 1
    assert "--from" in ran.err
    assert "lineage stamp" in ran.err
    assert run("port", store / "plain", "--from", store / "v1.safetensors", *goal).code == 0


def test_a_base_in_another_precision_is_found_and_said(store: Path, graph, run: Run) -> None:
    graph("v1-v2")
    half = {name: tensor.half() for name, tensor in load_file(store / "v2.safetensors").items()}
    save_file(half, "half.safetensors")
    ran = run("port", store / "lora", "--to", "half.safetensors", "--migrations", "ms", "-o", "out")
    assert ran.code == 0
    assert "half.safetensors is taken as v2.safetensors: its weights are equal up to rounding" in ran.err


@pytest.mark.parametrize(
    "more",
    [
        ("--to-fingerprint", "v1:0123456789abcdef", "-o", "out"),
        ("--migrations", "ms", "-o", "out"),
        ("--migrations", "ms", "--to-fingerprint", "short", "-o", "out"),
        ("--migrations", "ms", "--migration", "m.safetensors", "--to-fingerprint", "v1:0123456789abcdef", "-o", "out"),
    ],
)
def test_wrong_combinations_are_usage_errors(store: Path, graph, run: Run, more: tuple[str, ...]) -> None:
    graph("v1-v2")
    assert run("port", store / "lora", *more).code == 2


def test_a_folder_of_too_many_ways_is_an_error_and_no_long_wait(tmp_path: Path) -> None:
    """Ten bases, each with a migration to every other: a wish for two of them would look at a million ways."""
    bases = [BaseId(fingerprint=f"v1:{number:08}") for number in range(10)]
    header = Header.model_validate(
        {
            "version": "1.0",
            "from": None,
            "to": {"fingerprint": "v1:00000000"},
            "method": "x",
            "used": "x",
            "modules": [],
        }
    )
    edges = [Edge(tmp_path / f"{a}-{b}.safetensors", header, bases[a], bases[b]) for a, b in permutations(range(10), 2)]
    graph = Graph(tmp_path, tuple(edges))
    assert len(find_way(graph, bases[0], bases[9])) == 1
    assert [edge.file.stem for edge in find_way(graph, bases[0], bases[9], ["0-4", "4-9"])] == ["0-4", "4-9"]
    with pytest.raises(InputError, match="more than 5000 ways"):
        find_way(graph, bases[0], bases[9], [f"{n}-{n + 1}" for n in range(9)])


def test_check_judges_along_the_way_of_a_folder(store: Path, graph, run: Run) -> None:
    graph("v1-v2", "v2-v3")
    ran = run("check", store / "lora", "--to", store / "v3.safetensors", "--migrations", "ms", "--json")
    assert ran.code == 0, ran.err
    assert ran.record["method"] == "copy"
    assert {row["status"] for row in ran.record["modules"]} == {"ported"}
    assert run("check", store / "lora", "--migrations", "ms", "--migration", "m.safetensors").code == 2
    assert run("check", store / "lora", "--to-fingerprint", "v1:0123456789abcdef").code == 2


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ({"model": "a" * 64}, {"unet": "a" * 64}, True),
        ({"transformer": "a" * 64}, {"model": "a" * 64}, True),
        ({"model": "a" * 64}, {"unet": "a" * 64, "text_encoder": "b" * 64}, True),
        ({"model": "a" * 64}, {"unet": "c" * 64}, False),
        ({"unet": "a" * 64, "text_encoder": "b" * 64}, {"text_encoder": "a" * 64, "unet": "b" * 64}, False),
    ],
)
def test_a_component_alone_is_known_whatever_it_is_called(
    mine: dict[str, str], theirs: dict[str, str], same: bool
) -> None:
    given, known = (BaseId(fingerprint=f"v1:{i:08}", components=c) for i, c in enumerate((mine, theirs)))
    assert (recognise(given, {known.fingerprint: known}).base is known) == same
