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
from report.report_samples import verify
from verify import tiny

#: Verbs that the fast tier doesn't run, and why. Under ``-m slow`` those that end in minutes are run, too.
MINUTES = {"refine": "trains", "train": "trains", "verify": "draws pictures by both bases"}
#: Pages whose commands are run as they stand, and others, run with files under the names that they use.
OWN = ("start", "for-lora-makers", "for-llm-teams", "for-foundries", "for-researchers")
STANDING = ("README", "batch", "training", "adapters", "standard", "serving")
#: Files and values for the letters of docs/adapters.md.
GIVEN = {"F": "style.safetensors", "A": "a.safetensors", "B": "b.safetensors", "NAME": "kohya", "N": "4"}

_TRAINS = "trains for long: tests/training does it, on a few steps"
_REFINES = "over four minutes of training: tests/demo does it, by `demo --refine`"
_BRIDGE = "tests/bridge runs it, on models small enough"
_HUB = "needs a hub: tests/hub has one"
_SERVES = "serves until Ctrl-C: tests/ui has it"
_DEMO = "tests/demo runs it"
#: Commands that are run in no tier, and why; `bench` beside them, which trains bases for hours on first use.
NOT_RUN = {
    "regraft batch manifest.parquet --out s3://bucket/ported --ray auto": "a store: tests/batch has one",
    'regraft bridge run ADAPTER --from OLD --to NEW --prompt "a boat" --prompt "the sun" -o grid.png': _BRIDGE,
    'regraft bridge run ADAPTER --from OLD --to NEW --prompt "function" --mix 0.8 -o texts.txt': _BRIDGE,
    "regraft bridge train --from OLD --to NEW --self -o mapper.safetensors": _BRIDGE,
    "regraft check ADAPTER --from OLD --to NEW": "the first of the page on bridges: other pages have it with files",
    "regraft refine ADAPTER --from OLD --to NEW --teacher bridge --mapper mapper.safetensors -o adapter.safetensors": (
        _BRIDGE
    ),
    'regraft bridge run ADAPTER --from OLD --to NEW --mapper mapper.safetensors --prompt "a boat" -o grid.png': _BRIDGE,
    'regraft bridge run --from OLD --to NEW --controlnet NET --control-image edges.png --prompt "a boat" -o grid.png': (
        _BRIDGE
    ),
    "regraft bridge run my_lora.safetensors --from OLD --to NEW --prompt TEXT -o grid.png": _BRIDGE,
    "regraft train --subject 'my-cat=<v1> cat' --subject 'my-dog=<v2> dog' --cut-mix 0.6 --prior 50 "
    "--base my-sd-folder -o both.safetensors": _TRAINS,
    "regraft train --subject 'my-cat=<v1> cat' --subject 'my-dog=<v2> dog' --prior 50 --base my-sd-folder "
    "-o both.safetensors": _TRAINS,
    "regraft train PICTURES --base my-sd-folder -o my_lora.safetensors --steps 1500": _TRAINS,
    "regraft train TEXTS.jsonl --base my-llm-folder -o my_adapter --kind dora --rank 32": _TRAINS,
    "regraft train PICTURES --base $(python -c \"import regraft.demo; print(regraft.demo.data_folder() / 'v1')\") "
    "-o mine.safetensors --rank 8 --rate 2e-3 --steps 100": _TRAINS,
    "regraft train PICTURES --base OLD -o my_lora.safetensors": _TRAINS,
    "regraft refine style.safetensors --from v1 --to v3 -o refined.safetensors": _REFINES,
    "regraft refine my_lora.safetensors --from OLD --to NEW -o refined.safetensors": _REFINES,
    "regraft refine my_lora.safetensors --from OLD --to NEW -o refined.safetensors [--report page.html]": _REFINES,
    "regraft push ported.safetensors ORG/NAME --forecast check.json --measured verify.json --report report.html": _HUB,
    "regraft push my_lora.safetensors ORG/NAME": _HUB,
    "regraft port my-lora-stamped.safetensors --to new.safetensors --migrations foundry/migrations:sdxl "
    "-o ported.safetensors": "needs a hub: tests/hub has one with migrations",
    "regraft port my_lora.safetensors --to NEW --migrations FOLDER -o ported.safetensors": (
        "my_lora has a lineage only once it is stamped: docs/standard.md does both"
    ),
    "regraft lineage stamp my_lora.safetensors --base sd_xl_base_1.0.safetensors --in-place": (
        "the name after -o is stamped too, and a file is stamped once"
    ),
    "regraft ui": _SERVES,
    "regraft demo": _DEMO,
    "regraft demo --refine": _DEMO,
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
def standing(place: Path, request: pytest.FixtureRequest, run: Run) -> Path:
    """The same, with the words that stand for files in other pages; the test's parameter ``page`` says in which."""
    page = request.getfixturevalue("page")
    language = page == "serving"
    old, new = ("llm-v1", "llm-v2") if language else ("v1", "v2")
    for word, base in (("OLD", old), ("NEW", new), ("BASE", old), ("OTHER", new)):
        (place / word).symlink_to(place / base)
    for name in ("my_lora", "my-lora", "a", "b"):
        shutil.copy(place / "style.safetensors", place / f"{name}.safetensors")
    for name, base in (("sd_xl_base_1.0", "v1"), ("old", "v1"), ("new", "v2"), ("newer", "v3")):
        (place / f"{name}.safetensors").symlink_to(place / base / "unet" / "diffusion_pytorch_model.safetensors")
    if language:
        shutil.rmtree(place / "LORAS")
        shutil.copytree(place / "support", place / "LORAS" / "people" / "anna")
        (place / "REFINED").mkdir()
        (place / "prompts.txt").write_text("the river is in\na rain on the river\n", encoding="utf-8")
    if page == "standard":
        with_migrations(place, run)
        (place / "verify.json").write_text(verify().to_json(), encoding="utf-8")
    return place


def with_migrations(place: Path, run: Run) -> None:
    """What docs/standard.md has from elsewhere: migrations to compose, and a folder of them."""
    (place / "FOLDER").mkdir()
    for old, new, output in (
        ("old", "new", "FOLDER/old-new"),
        ("old", "new", "v1-v2"),
        ("new", "newer", "v2-v3"),
    ):
        made = ("--from", f"{old}.safetensors", "--to", f"{new}.safetensors", "-o", f"{output}.safetensors")
        ran = run("migration", "make", *made, "--method", "lora-x")
        assert ran.code == 0, ran.err


def minutes(command: Command) -> bool:
    """Whether it takes longer than the fast tier may."""
    words = command.arguments
    # A port of the demo's bases runs both, unless it is told not to or has what was fitted before.
    quick = {"--weights-only", "--migrations", "--migration", "--dry-run"}
    runs = words[0] == "port" and {"v1", "OLD"} & set(words) and not quick & set(words) and not command.code
    return words[0] in MINUTES or bool(runs)


def typed(command: Command) -> str:
    """A command's line with one space between words."""
    return " ".join(command.line.split())


def runnable(page: Path, *, slow: bool) -> list[Command]:
    found = [c for c in commands(page) if c.arguments[0] != "bench" and typed(c) not in NOT_RUN]
    return [command for command in found if slow or not minutes(command)]


def made(files: set[str], command: Command) -> bool:
    """Whether what the command reads is there: in the fast tier, what a left-out command would have written is not."""
    outputs = {command.arguments[i + 1] for i, word in enumerate(command.arguments[:-1]) if word in ("-o", "--out")}
    read = {word for word in command.arguments[1:] if re.fullmatch(r"[\w/-]+\.(safetensors|json)", word)} - outputs
    return read <= files


def run_page(page: Path, run: Run, place: Path, *, slow: bool) -> int:
    done = 0
    for number, command in enumerate(runnable(page, slow=slow)):
        if command.is_synopsis or set(GIVEN) & set(command.arguments):
            command = command.simplest({**GIVEN, "G": f"made-{number}.safetensors", "BASE...": "BASE"})
        present = {file.relative_to(place).as_posix() for file in place.rglob("*.safetensors")}
        if not slow and not made(present, command):
            continue
        ran = run(*command.typed)
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
@pytest.mark.parametrize("page", STANDING)
def test_the_slow_commands_of_other_pages_too(page: str, run: Run, standing: Path) -> None:
    (file,) = [file for file in PAGES if file.stem == page]
    assert run_page(file, run, standing, slow=True)


def test_every_command_is_run_or_it_is_said_why_not() -> None:
    pages = {file.stem: file for file in PAGES}
    ran = {typed(command) for page in (*OWN, *STANDING) for command in runnable(pages[page], slow=True)}
    told = {typed(command) for page in PAGES for command in commands(page) if command.arguments[0] != "bench"}
    assert told - ran == set(NOT_RUN)


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
