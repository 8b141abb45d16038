from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for folder in (".", "cli", "formats", "standard"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

from running import run  # noqa: E402, F401 (a fixture for all tests)


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees another's cache, a hub, or more threads than its share."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
