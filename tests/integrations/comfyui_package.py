"""The package of nodes, for the tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parents[2] / "integrations" / "comfyui"


def imported(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package, as the host imports it: by its path, under a name of the folder."""
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_regraft", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module
