from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from safetensors.torch import save_file

from regraft.adapter import Adapter
from regraft.cli import main
from regraft.errors import InputError
from regraft.runtime import load_model
from regraft.updates import LowRank


def _saved(adapter: Adapter, folder: Path) -> Path:
    """A PEFT folder, as PEFT's own names have it."""
    folder.mkdir()
    tensors = {}
    for ref, update in adapter.updates.items():
        assert isinstance(update, LowRank)
        tensors[f"base_model.model.{ref.path}.lora_A.weight"] = update.down.load().contiguous()
        tensors[f"base_model.model.{ref.path}.lora_B.weight"] = update.up.load().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(iter(adapter.updates.values())).rank
    names = sorted({ref.path.rpartition(".")[2] for ref in adapter.updates})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cli")
    old, new = tiny.llama(folder / "old"), tiny.llama(folder / "new", drift=0.05)
    lora = _saved(tiny.lora(load_model(old).main, ["q_proj", "v_proj"]), folder / "lora")
    return [str(lora), str(lora), "--from", str(old), "--to", str(new), "--n-inputs", "3"]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``regraft verify`` in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["regraft", "verify", "--threads", "1", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        code = exit.value.code
        return int(code or 0), *capsys.readouterr()

    return run


def test_json_is_the_record_and_the_page_stands_beside_it(case: list[str], run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = run(*case, "--json", "--report", str(page))
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert set(record["controls"]) == {"none", "copy", "random"}
    assert record["effect_cosine"] == record["controls"]["copy"]["effect_cosine"]
    assert record["effect_cosine"]["low"] <= record["effect_cosine"]["mean"] <= record["effect_cosine"]["high"]
    assert record["kl"]["mean"] > 0
    assert record["controls"]["none"]["effect_cosine"]["mean"] is None
    assert page.read_text(encoding="utf-8").startswith("<!")


def test_the_table_names_the_controls(case: list[str], run: Run) -> None:
    code, out, _ = run(*case)
    assert code == 0
    assert "MEASURED" in out
    assert "effect cosine" in out
    assert "KL" in out


def test_wrong_use_and_wrong_prompts_are_one_line(case: list[str], run: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    code, out, err = run(*case, "--prompts", str(empty))
    assert (code, out) == (1, "")
    assert "holds no prompts" in err
    code, out, err = run(*case[:4])
    assert (code, out) == (2, "")
    assert "--from and --to" in err


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], 0),
        (["--report", "PAGE"], 4),
        (["--report", "PAGE", "--pictures", "0"], 0),
        (["--pictures", "2"], 2),
    ],
)
def test_a_page_asks_for_4_pictures(
    case: list[str], options: list[str], wanted: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def stop(*_: object, pictures: int, **__: object) -> None:
        asked.append(pictures)
        raise InputError("enough")

    monkeypatch.setattr("regraft.cli.verify.verify_adapters", stop)
    code, _, err = run(*case, *(option.replace("PAGE", str(tmp_path / "page.html")) for option in options))
    assert (code, "enough" in err) == (1, True)
    assert asked == [wanted]
