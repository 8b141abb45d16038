"""Options are checked before anything is read, from Python as from the command line."""

from __future__ import annotations

import pytest

from regraft.errors import UsageError
from regraft.methods import get_method, methods


def test_every_method_takes_its_own_defaults() -> None:
    for method in methods().values():
        assert method.check_options(method.options) == method.options


@pytest.mark.parametrize(
    ("method", "option", "value"), [("effect", "pull", "far"), ("effect", "cut", "short"), ("lora-x", "energy", [1])]
)
def test_a_value_of_another_kind_is_an_error_of_use(method: str, option: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"--{option}"):
        get_method(method).check_options({option: value})
