"""Migrations compose as those of a database do: v1 → v2 and v2 → v3 give v1 → v3, exactly."""

from __future__ import annotations

from dataclasses import replace
from itertools import product as pairs_of
from pathlib import Path

import pytest
import torch

from regraft import InputError, ModuleRef, Refused, Settings, fit_migration, load_migration, open_base
from regraft.adapter import MODEL
from regraft.base import Base
from regraft.migration import Migration
from regraft.migrations.algebra import Products, product
from regraft.migrations.compose import compose, compose_all, nearness_over
from regraft.nearness import Nearness
from regraft.transport import IDENTITY, LinearMap, Transport, projection
from toys import deltas, drifted, llama, lora, permutation, regauged, relative_error, rotation, save_base


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SQUARE = {
    "identity": IDENTITY,
    "multiple": LinearMap(2.5),
    "diagonal": LinearMap(0.0, None, None, noise(12, seed=1)),
    "dense": LinearMap(0.0, noise(12, 12, seed=2)),
    "projection": projection(torch.linalg.qr(noise(12, 3, seed=3))[0]),
    "complement": LinearMap(1.0, -noise(12, 3, seed=4), noise(3, 12, seed=5)),
    "wide complement": LinearMap(0.5, noise(12, 7, seed=6), noise(7, 12, seed=7)),
    "everything": LinearMap(0.3, noise(12, 2, seed=8), noise(2, 12, seed=9), noise(12, seed=10)),
    "dense and more": LinearMap(0.3, noise(12, 12, seed=11), None, noise(12, seed=12)),
}


@pytest.mark.parametrize(("second", "first"), [*pairs_of(SQUARE, SQUARE)], ids=lambda name: name)
def test_the_product_of_two_maps_is_one_after_the_other(second: str, first: str) -> None:
    x = noise(12, 5, seed=20)
    one, two = SQUARE[first], SQUARE[second]
    both = product(two, one)
    torch.testing.assert_close(both @ x, two @ (one @ x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.on_the_right(x.T), one.on_the_right(two.on_the_right(x.T)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.T @ x, one.T @ (two.T @ x), rtol=1e-4, atol=1e-4)


def test_maps_that_change_the_size_compose() -> None:
    up, down = LinearMap(0.0, noise(20, 3), noise(3, 12)), LinearMap(0.0, noise(8, 20, seed=1))
    both = product(down, up)
    torch.testing.assert_close(both @ noise(12, 4), down @ (up @ noise(12, 4)), rtol=1e-5, atol=1e-5)
    # The thin factors are kept: no (8, 12) matrix where (8, 3) and (3, 12) hold the same.
    assert both.right is not None
    assert (tuple(both.left.shape), tuple(both.right.shape)) == ((8, 3), (3, 12))


def test_shared_maps_and_transposes_stay_shared() -> None:
    old, new = LinearMap(0.0, rotation(12, 1)), LinearMap(0.0, rotation(12, 2))
    products = Products()
    one, again = products(new, old), products(new, old)
    turned = products(old.T, new.T)
    assert one.left.data_ptr() == again.left.data_ptr() == turned.left.data_ptr()
    torch.testing.assert_close(turned.left, one.left.T)


def test_sums_of_terms_multiply_out() -> None:
    two = Transport(((SQUARE["projection"], SQUARE["diagonal"]), (SQUARE["complement"], SQUARE["dense"])))
    one = Transport(((SQUARE["everything"], SQUARE["complement"]), (SQUARE["multiple"], SQUARE["projection"])))
    both = Products().transport(two, one)
    delta = noise(12, 12, seed=30)
    assert relative_error(both.dense(delta), two.dense(one.dense(delta))) < 1e-6


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    """Three versions: the second trained on, the third in other coordinates as well."""
    folder = tmp_path_factory.mktemp("chain")
    first = llama()
    second = drifted(first, 0.1)
    third = drifted(regauged(second, rotation(24, 3), permutation(40, 5)), 0.05, seed=4)
    states = {"v1": first, "v2": second, "v3": third}
    return [open_base(save_base(state, folder / f"{name}.safetensors")) for name, state in states.items()]


@pytest.mark.parametrize(
    ("method1", "method2"),
    [("copy", "procrustes"), ("lora-x", "procrustes"), ("procrustes", "lora-x"), ("copy", "copy")],
)
def test_a_port_through_the_composed_one_is_the_two_ports_after_each_other(
    chain: list[Base], method1: str, method2: str
) -> None:
    one, two = fit_migration(chain[0], chain[1], method1), fit_migration(chain[1], chain[2], method2)
    forced = Settings(force=True)
    adapter = lora(llama())
    in_turn = two.port(one.port(adapter, forced).adapter, forced).adapter
    at_once = compose(one, two).port(adapter, forced).adapter
    assert deltas(at_once).keys() == deltas(in_turn).keys()
    for ref, delta in deltas(in_turn).items():
        assert relative_error(deltas(at_once)[ref], delta) < 1e-5


def test_methods_of_several_terms_compose_where_no_rank_is_cut(chain: list[Base]) -> None:
    one, two = fit_migration(chain[0], chain[1], "prolora"), fit_migration(chain[1], chain[2], "prolora")
    forced, adapter = Settings(force=True, rank=24), lora(llama())
    in_turn = two.port(one.port(adapter, forced).adapter, forced).adapter
    composed = compose(one, two)
    assert max(len(e.transport.terms) for e in composed.entries.values() if e.transport is not None) == 4
    for ref, delta in deltas(composed.port(adapter, forced).adapter).items():
        assert relative_error(delta, deltas(in_turn)[ref]) < 1e-4


def test_dora_magnitudes_follow_the_norms_of_both_ends(chain: list[Base]) -> None:
    one, two = fit_migration(chain[0], chain[1], "copy"), fit_migration(chain[1], chain[2], "copy")
    forced, adapter = Settings(force=True), lora(llama(), dora=True)
    in_turn = two.port(one.port(adapter, forced).adapter, forced).adapter
    at_once = compose(one, two).port(adapter, forced).adapter
    for ref, update in in_turn.updates.items():
        torch.testing.assert_close(at_once.updates[ref].magnitude.load(), update.magnitude.load())


@pytest.mark.parametrize("method", ["copy", "prolora", "procrustes"])
def test_an_identity_composes_to_the_same_bytes(chain: list[Base], tmp_path: Path, method: str) -> None:
    first, second = chain[:2]
    names = {"before": fit_migration(first, first, "copy"), "after": fit_migration(second, second, "copy")}
    before, after = (load_migration(made.save(tmp_path / f"{name}.safetensors")) for name, made in names.items())
    file = fit_migration(first, second, method).save(tmp_path / "m.safetensors")
    made = load_migration(file)
    for name, composed in (("left", compose(before, made)), ("right", compose(made, after))):
        assert composed.save(tmp_path / f"{name}.safetensors").read_bytes() == file.read_bytes()


def test_the_order_of_composing_does_not_matter(chain: list[Base]) -> None:
    back = fit_migration(chain[2], chain[0], "procrustes")
    one, two = fit_migration(chain[0], chain[1], "lora-x"), fit_migration(chain[1], chain[2], "procrustes")
    left, right = compose(compose(one, two), back), compose(one, compose(two, back))
    delta = noise(24, 24)
    module = ModuleRef(MODEL, "model.layers.1.self_attn.q_proj")
    results = [m.entries[module].transport.dense(delta) for m in (left, right, compose_all([one, two, back]))]
    assert relative_error(results[0], results[1]) < 1e-5
    torch.testing.assert_close(results[0], results[2])


def test_migrations_that_do_not_meet_are_refused(chain: list[Base]) -> None:
    one, two = fit_migration(chain[0], chain[1], "copy"), fit_migration(chain[1], chain[2], "copy")
    with pytest.raises(Refused, match=r"begins at v1\.safetensors.*ends at v3\.safetensors"):
        compose(two, one)
    with pytest.raises(Refused, match="no old base"):
        compose(one, replace(two, source=None))


def test_what_is_skipped_on_either_step_is_skipped_on_the_whole_way(chain: list[Base]) -> None:
    one, two = fit_migration(chain[0], chain[1], "copy"), fit_migration(chain[1], chain[2], "copy")
    first, second, third = list(one.entries)[:3]
    one = without(one, first, "left out at the first step", uncovered=False)
    two = without(two, second, "changed its shape", uncovered=True)
    two = replace(two, entries={ref: entry for ref, entry in two.entries.items() if ref != third})
    whole = compose(one, two).entries
    assert (whole[first].transport, whole[first].reason, whole[first].uncovered) == (
        None,
        "left out at the first step",
        False,
    )
    assert whole[second].transport is None
    assert "changed its shape" in whole[second].reason
    assert whole[second].uncovered
    assert "has no module" in whole[third].reason
    assert whole[third].uncovered


def without(migration: Migration, ref: ModuleRef, reason: str, *, uncovered: bool) -> Migration:
    lost = replace(
        migration.entries[ref], target=None, transport=None, shape_new=None, reason=reason, uncovered=uncovered
    )
    return replace(migration, entries={**migration.entries, ref: lost})


def test_pairings_by_depth_compose(tmp_path: Path) -> None:
    state = llama(layers=4)
    shallow = {name: tensor for name, tensor in state.items() if ".layers.3." not in name}
    deep, middle = (open_base(save_base(s, tmp_path / f"{n}.safetensors")) for n, s in (("a", state), ("b", shallow)))
    renamed = {name.removeprefix("model."): tensor for name, tensor in shallow.items()}
    last = open_base(save_base(renamed, tmp_path / "c.safetensors"))
    whole = compose(fit_migration(deep, middle, "copy"), fit_migration(middle, last, "copy"))
    module = ModuleRef(MODEL, "model.layers.1.self_attn.q_proj")
    assert whole.entries[module].target == ModuleRef(MODEL, "layers.1.self_attn.q_proj")
    dropped = whole.entries[ModuleRef(MODEL, "model.layers.3.self_attn.q_proj")]
    assert dropped.transport is None
    assert "no counterpart" in dropped.reason


def test_the_composed_drift_is_never_below_the_true_one(chain: list[Base]) -> None:
    near = drifted(llama(), 0.1), drifted(drifted(llama(), 0.1), 0.1, seed=9)
    old, new = llama()["lm_head.weight"], near[1]["lm_head.weight"]
    bound = nearness_over(Nearness(0.995, 0.1), Nearness(0.995, 0.1))
    assert bound.distance >= float((new - old).norm() / old.norm())
    # Drifts of random directions: cosines multiply.
    assert bound.similarity == pytest.approx(float((new * old).sum() / new.norm() / old.norm()), abs=0.01)
    assert nearness_over(Nearness(1.0, 0.0), Nearness(0.9, 0.3)) == Nearness(0.9, 0.3)
    assert nearness_over(Nearness(), Nearness(0.9, 0.3)) == Nearness()
    one, two = fit_migration(chain[0], chain[1], "copy"), fit_migration(chain[1], chain[2], "copy")
    assert all(entry.derived for entry in compose(one, two).entries.values())


def test_a_composed_file_says_what_it_was_made_of(chain: list[Base], tmp_path: Path) -> None:
    files = []
    for number, (old, new) in enumerate(((chain[0], chain[1]), (chain[1], chain[2]))):
        made = replace(fit_migration(old, new, "copy"), license=["apache-2.0", "mit"][number])
        files.append(load_migration(made.save(tmp_path / f"{number}.safetensors")))
    again = load_migration(compose(*files).save(tmp_path / "whole.safetensors"))
    assert again.composed == tuple(file.file_hash for file in files)
    assert [base.path for base in again.via] == ["v2.safetensors"]
    assert again.license == "(apache-2.0) AND (mit)"


def test_a_transport_of_too_many_terms_is_an_error_that_says_what_to_do(chain: list[Base]) -> None:
    there, back = fit_migration(chain[0], chain[1], "prolora"), fit_migration(chain[1], chain[0], "prolora")
    with pytest.raises(InputError, match="64 are allowed"):
        compose_all([there, back] * 4)
