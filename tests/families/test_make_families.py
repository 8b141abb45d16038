"""The family files are what their tool writes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_tool_writes_the_files_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("tools", None)
    tool = importlib.import_module("tools.make_families.__main__")
    monkeypatch.setattr(tool, "FOLDER", tmp_path)
    tool.main()
    for name in tool.MODELS:
        made = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
        assert json.loads(made)["parameters"]
        assert made == (ROOT / "src/regraft/families/tables" / f"{name}.json").read_text(encoding="utf-8")
