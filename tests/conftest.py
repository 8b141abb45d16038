from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for folder in (".", "cli", "formats", "standard"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

from running import run  # noqa: E402, F401 (a fixture for all tests)

from verify import tiny  # noqa: E402


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees another's cache, a hub, or more threads than its share."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def old(folder: Path) -> Path:
    """A small language model, as an adapter was trained on it."""
    return tiny.llama(folder / "old")


@pytest.fixture(scope="module")
def drifted(folder: Path) -> Path:
    """The same, trained on."""
    return tiny.llama(folder / "drifted", drift=0.3)
