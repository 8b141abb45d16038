"""Options are checked before anything is read, from Python as from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from regraft import fitting, open_base
from regraft.errors import UsageError
from regraft.fitting import fit_migration
from regraft.methods import get_method, methods
from toys import drifted, llama, lora, save_base


def test_every_method_takes_its_own_defaults() -> None:
    for method in methods().values():
        assert method.check_options(method.options) == method.options


@pytest.mark.parametrize(
    ("method", "option", "value"), [("effect", "pull", "far"), ("effect", "cut", "short"), ("lora-x", "energy", [1])]
)
def test_a_value_of_another_kind_is_an_error_of_use(method: str, option: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"--{option}"):
        get_method(method).check_options({option: value})


@pytest.mark.parametrize(("options", "both"), [({}, False), ({"edge": 0.35}, False), ({"threshold": -1.0}, True)])
def test_lora_x_holds_the_old_weight_only_where_it_looks_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], both: bool
) -> None:
    held: list[bool] = []
    fit_module = fitting.fit_module

    def seen(method: Any, old: Any, new: Any, settings: Any) -> Any:
        held.append(old is not None)
        return fit_module(method, old, new, settings)

    monkeypatch.setattr(fitting, "fit_module", seen)
    state = llama(layers=1)
    bases = (open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.1))))
    fitted = fit_migration(*bases, "lora-x", **options)
    assert set(held) == {both}
    # Measured all the same.
    assert all(entry.nearness.distance == pytest.approx(0.1, rel=1e-3) for entry in fitted.entries.values())


@pytest.mark.parametrize("method", ["auto", "procrustes", "prolora", "lora-x"])
def test_progress_counts_every_module_once(tmp_path: Path, method: str) -> None:
    state = llama(layers=2)
    bases = (open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.1))))
    told: list[tuple[int, int]] = []
    migration = fit_migration(*bases, method, tick=lambda done, total, what: told.append((done, total)))
    count = len(migration.entries)
    assert {total for _, total in told} == {count}
    # Methods that go module by module tell which one comes next, and at last that all are done.
    assert [done for done, _ in told] in (list(range(1, count + 1)), list(range(count + 1)))


@pytest.mark.parametrize("method", ["auto", "procrustes"])
def test_progress_counts_none_beyond_those_that_the_adapter_touches(tmp_path: Path, method: str) -> None:
    state = llama(layers=2)
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.1)))]
    path = "model.layers.1.self_attn.q_proj"
    adapter = lora({f"{path}.weight": state[f"{path}.weight"]})
    told: list[tuple[int, int]] = []
    fit_migration(*bases, method, adapter=adapter, tick=lambda done, total, what: told.append((done, total)))
    assert told == [(1, 1)]
