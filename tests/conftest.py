from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for folder in (".", "cli", "formats", "standard"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

from running import run  # noqa: E402, F401 (a fixture for all tests)

from regraft.runtime import load_model  # noqa: E402
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


@pytest.fixture(scope="module")
def numbered(old: Path, folder: Path) -> tuple[Path, Path]:
    """One model twice: the words of the second have other ids."""
    first, second = folder / "numbered", folder / "renumbered"
    for place, words in ((first, tiny.NUMBERED), (second, [tiny.NUMBERED[i] for i in tiny.ORDER])):
        model = load_model(old).main
        rows = torch.tensor([0, 1, 2, *(3 + tiny.NUMBERED.index(word) for word in words)])
        for part in (model.model.embed_tokens, model.lm_head):
            part.weight.data = part.weight.data[rows]
        model.save_pretrained(place)
        tiny.write_tokenizer(place, words)
    return first, second
