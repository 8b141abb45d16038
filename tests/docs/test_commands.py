"""Every command on a page can be typed: all are parsed, and those that need no minutes are run as they stand."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import WRONG, unknown_in, verb_of, whole
from page_blocks import PAGES, ROOT, Command, commands, fences, python
from running import Run

import regraft.methods
from regraft import load_adapter
from regraft.demo import data_folder
from regraft.runtime import load_model
from verify import tiny

#: Verbs that the fast tier doesn't run, and why. Under ``-m slow`` those that end in minutes are run, too.
MINUTES = {"refine": "trains", "train": "trains", "verify": "draws pictures by both bases"}
NEVER = {
    "demo": "tests/demo runs it",
    "bench": "trains bases for hours on first use",
    "push": "needs a hub",
    "bridge": "tests/bridge runs it, on models small enough",
    "ui": "serves until Ctrl-C: tests/ui has it",
}
#: Pages whose commands are run as they stand, and others, run with files under the names that they use.
OWN = ("start", "for-lora-makers", "for-llm-teams", "for-foundries", "for-researchers")
STANDING = ("README", "batch", "training")
#: What isn't run of the verbs that are.
NEEDS = {
    "refine style.safetensors": "over four minutes of training: tests/demo does it, by `demo --refine`",
    "--migrations FOLDER": "my_lora has a lineage only once it is stamped",
    "s3://": "a store: tests/batch has one",
    "--in-place": "the name after -o is stamped too, and a file is stamped once",
}


def named(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_of_a_page_parses(page: Path) -> None:
    told = whole()
    for command in commands(page):
        verb, rest = verb_of(told, re.findall(r"\S+", command.line)[1:] if command.is_synopsis else command.arguments)
        assert verb is not told, f"no such verb: {command.line}"
        if command.is_synopsis:
            known = {option for parameter in verb.params for option in parameter.opts}
            assert set(re.findall(r"--[a-z][a-z-]*", " ".join(rest))) <= known, command.line
            continue
        try:
            verb.make_context(verb.name, rest)
        except WRONG as error:
            pytest.fail(f"{command.line}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_options_that_a_page_speaks_of_exist(page: Path) -> None:
    """In running text: `--option` alone, or `regraft verb --option`."""
    assert unknown_in(re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)) == []


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that pages name, as docs/start.md makes it, and a small language model beside."""
    data = data_folder()
    for base in ("v1", "v2", "v2-retrained", "v3", "loras"):
        (tmp_path / base).symlink_to(data / base)
    shutil.copy(data / "loras" / "style-v1.safetensors", tmp_path / "style.safetensors")
    tiny.llama(tmp_path / "llm-v1", vocab=48)
    tiny.llama(tmp_path / "llm-v2", drift=0.05)
    for model in ("llm-v1", "llm-v2"):
        tiny.write_tokenizer(tmp_path / model, tiny.WORDS * 2)
    tiny.lora(load_model(tmp_path / "llm-v1").main, ["q_proj", "v_proj"]).save(tmp_path / "support")
    for library, file in (("LORAS", "style.safetensors"), ("adapters", "support")):
        (tmp_path / library).mkdir()
        if (tmp_path / file).is_dir():
            shutil.copytree(tmp_path / file, tmp_path / library / file)
        else:
            shutil.copy(tmp_path / file, tmp_path / library / file)
    (tmp_path / "migrations").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def standing(place: Path) -> Path:
    """The same, with the words that stand for files in older pages."""
    for word, base in (("OLD", "v1"), ("NEW", "v2"), ("BASE", "v1"), ("OTHER", "v2")):
        (place / word).symlink_to(place / base)
    for name in ("my_lora", "a", "b"):
        shutil.copy(place / "style.safetensors", place / f"{name}.safetensors")
    (place / "sd_xl_base_1.0.safetensors").symlink_to(place / "v1" / "unet" / "diffusion_pytorch_model.safetensors")
    return place


def minutes(command: Command) -> bool:
    """Whether it takes longer than the fast tier may."""
    words = command.arguments
    # A port of the demo's bases runs both, unless it is told not to or has what was fitted before.
    quick = {"--weights-only", "--migrations", "--migration", "--dry-run"}
    runs = words[0] == "port" and {"v1", "OLD"} & set(words) and not quick & set(words) and not command.code
    return words[0] in MINUTES or bool(runs)


def runnable(page: Path, *, slow: bool) -> list[Command]:
    found = [c for c in commands(page) if not c.is_synopsis and c.arguments[0] not in NEVER]
    found = [c for c in found if not any(part in c.line for part in NEEDS)]
    return [command for command in found if slow or not minutes(command)]


def made(files: set[str], command: Command) -> bool:
    """Whether what the command reads is there: in the fast tier, what a left-out command would have written is not."""
    outputs = {command.arguments[i + 1] for i, word in enumerate(command.arguments[:-1]) if word in ("-o", "--out")}
    read = {word for word in command.arguments[1:] if re.fullmatch(r"[\w/-]+\.(safetensors|json)", word)} - outputs
    return read <= files


def run_page(page: Path, run: Run, place: Path, *, slow: bool) -> int:
    done = 0
    for command in runnable(page, slow=slow):
        present = {file.relative_to(place).as_posix() for file in place.rglob("*.safetensors")}
        if not slow and not made(present, command):
            continue
        ran = run(*command.arguments)
        assert ran.code == command.code, f"{command.line}: {ran.code}\n{ran.err}{ran.out}"
        done += 1
    return done


def run_python(page: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The page's Python, block after block; what it left behind."""
    # No other test is to meet a method that a page registers.
    monkeypatch.setattr(regraft.methods, "_REGISTRY", dict(regraft.methods.methods()))
    names: dict[str, Any] = {"__name__": page.stem}
    for block in python(page):
        # This file's own `from __future__` is not the page's.
        exec(compile(block, page.name, "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize("page", OWN)
def test_the_commands_of_a_page_do_what_it_says(page: str, run: Run, place: Path) -> None:
    assert run_page(ROOT / "docs" / f"{page}.md", run, place, slow=False)


@pytest.mark.parametrize("page", STANDING)
def test_the_commands_of_other_pages_run_where_files_have_their_names(page: str, run: Run, standing: Path) -> None:
    (file,) = [file for file in PAGES if file.stem == page]
    assert run_page(file, run, standing, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", OWN)
def test_the_slow_commands_of_a_page_too(page: str, run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ROOT / "docs" / f"{page}.md"
    # What a page shows in Python comes first: its commands may read what that writes.
    run_python(file, monkeypatch)
    assert run_page(file, run, place, slow=True)


def test_the_method_of_the_page_is_registered_and_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_python(ROOT / "docs" / "for-researchers.md", monkeypatch)
    assert "damped-copy" in regraft.methods.methods()
    assert regraft.methods.get_method("damped-copy").options == {"power": 1.0}
    assert "84 modules" in capsys.readouterr().out
    assert set(load_adapter(place / "damped.safetensors").updates) == set(
        load_adapter(place / "style.safetensors").updates
    )


def test_the_adapter_is_ported_while_it_is_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = run_python(ROOT / "docs" / "for-llm-teams.md", monkeypatch)["model"]
    assert any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_on_a_page_compiles_and_what_it_imports_is_there(page: Path) -> None:
    for block in python(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("regraft"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module}.{name.name}"


@pytest.mark.slow
def test_the_folder_of_the_ten_minutes_is_made_as_the_page_says(tmp_path: Path) -> None:
    (setup,) = [text for _, text in fences(ROOT / "docs" / "start.md") if text.startswith("cp ")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    subprocess.run(["bash", "-euc", setup], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    assert {"v1", "v2", "v2-retrained", "v3", "style.safetensors"} <= {
        file.name for file in (tmp_path / "ten-minutes").iterdir()
    }
