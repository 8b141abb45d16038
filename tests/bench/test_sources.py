"""A cell is made anew when its method's code changes, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from regraft.bench import sources


@pytest.fixture
def _fresh() -> None:
    for cached in (
        sources.source_of,
        sources.source_of_check,
        sources._all_methods,
        sources._closure,
        sources._imports,
    ):
        cached.cache_clear()


def test_methods_differ_and_stay_the_same() -> None:
    assert sources.source_of("copy") != sources.source_of("procrustes")
    assert sources.source_of("procrustes") == sources.source_of("procrustes")


@pytest.mark.usefixtures("_fresh")
def test_a_change_of_code_counts_and_a_comment_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = sources.source_of("procrustes"), sources._code
    method = Path(sources._file("regraft.methods.procrustes") or "")
    text = method.read_text(encoding="utf-8")
    for change, same in (("# a comment\n", True), ("CHANGED = 1\n", False)):
        (tmp_path / "changed.py").write_text(text + change, encoding="utf-8")
        monkeypatch.setattr(sources, "_code", lambda file: real(tmp_path / "changed.py" if file == method else file))
        sources.source_of.cache_clear()
        assert (sources.source_of("procrustes") == before) is same
        assert sources.source_of("copy") == sources.source_of("copy")
    # `auto` may choose any of them.
    monkeypatch.undo()
    sources.source_of.cache_clear()
    auto = sources.source_of("auto")
    monkeypatch.setattr(sources, "_code", lambda file: real(tmp_path / "changed.py" if file == method else file))
    sources.source_of.cache_clear()
    assert sources.source_of("auto") != auto


@pytest.mark.usefixtures("_fresh")
def test_a_check_is_made_anew_when_its_rules_change_and_the_methods_cells_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, copied, real = sources.source_of_check(), sources.source_of("copy"), sources._code
    rules = sources._file("regraft.check")
    assert rules is not None
    (tmp_path / "changed.py").write_text(rules.read_text(encoding="utf-8") + "CHANGED = 1\n", encoding="utf-8")
    monkeypatch.setattr(sources, "_code", lambda file: real(tmp_path / "changed.py" if file == rules else file))
    sources.source_of_check.cache_clear()
    sources.source_of.cache_clear()
    assert sources.source_of_check() != before
    assert sources.source_of("copy") == copied
