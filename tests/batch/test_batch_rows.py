"""What sources come to: folders, globs, manifests, each adapter once, with its options and its output's name."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from library import make_library
from running import Run

from regraft.batch import Row, expand
from regraft.batch.options import RowOptions
from regraft.batch.rows import name_on_disk
from regraft.errors import InputError, UsageError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_library(tmp_path / "loras")
    return tmp_path


def found(*sources: str, **options: Any) -> list[Row]:
    return expand(sources, "old", "new", RowOptions(**options))


def test_a_folder_gives_files_and_peft_folders_each_once(here: Path) -> None:
    (here / "loras" / "README.md").write_text("no adapter")
    (here / "loras" / ".hidden.safetensors").write_bytes(b"")
    rows = found("loras", "loras/")
    assert sorted(row.name for row in rows) == ["a0", "a2", "file.safetensors", "sub/a1"]
    assert {row.output for row in rows} == {"a0", "a2", "file", "sub/a1"}
    assert all(Path(row.adapter).is_absolute() and Path(row.source).is_absolute() for row in rows)


def test_a_glob_keeps_the_folders_below_its_fixed_part(here: Path) -> None:
    assert [row.name for row in found("loras/**/a*")] == ["a0", "a2", "sub/a1"]


def test_two_of_one_name_get_outputs_of_their_own(here: Path) -> None:
    rows = found("loras/a0", "loras/sub/a1", str(make_library(here / "other") / "a0"))
    assert len({row.output for row in rows}) == 3
    assert [row.output.partition(".")[0] for row in rows] == ["a0", "a1", "a0"]


@pytest.mark.parametrize("folder", ["ink", "INK"])
def test_no_output_lies_in_another_that_may_be_a_folder(here: Path, folder: str) -> None:
    for name in ("ink.safetensors", f"{folder}/e1.safetensors", "oil/e1.safetensors"):
        (here / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "files" / name).write_bytes(b"")
    outputs = {row.name: row.output for row in found("files", format="peft")}
    assert re.fullmatch(r"ink\.[0-9a-f]{8}", outputs["ink.safetensors"])
    assert re.fullmatch(folder + r"/e1\.[0-9a-f]{8}", outputs[f"{folder}/e1.safetensors"])
    assert outputs["oil/e1.safetensors"] == "oil/e1"
    # Of files, each keeps its suffix.
    assert {row.output for row in found("files")} == {"ink", f"{folder}/e1", "oil/e1"}


def test_an_adapters_folder_that_is_called_as_a_sub_folder_gets_another_name(here: Path) -> None:
    make_library(here / "more" / "a0" / "deeper")
    outputs = {row.name: row.output for row in found("loras/a0", "more")}
    for name in ("a0", "a0/deeper/a0"):
        assert re.fullmatch(name + r"\.[0-9a-f]{8}", outputs[name])


def test_what_lies_in_the_output_folder_is_no_input(here: Path) -> None:
    make_library(here / "loras" / "PORTED")
    rows = expand(["loras"], "old", "new", RowOptions(), without=str(here / "loras" / "PORTED"))
    assert len(rows) == 4


TABLE = [
    {"adapter": "loras/a0", "strength": 0.5, "rank": None},
    {"adapter": "loras/sub/a1", "to": "newer", "method": "lora-x", "rank": 2.0},
    {"adapter": "loras/a2", "force": True, "output": "named/it"},
]


def write_csv(file: Path) -> None:
    names = ["adapter", "to", "method", "strength", "rank", "force", "output", "_note"]
    cells = [["" if row.get(name) is None else str(row[name]) for name in names] for row in TABLE]
    file.write_text("\n".join(",".join(row) for row in [names, *cells]) + "\n", encoding="utf-8-sig")


def write_jsonl(file: Path) -> None:
    file.write_text("\n\n".join(map(json.dumps, TABLE)))


def write_parquet(file: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = {name for row in TABLE for name in row}
    parquet.write_table(pyarrow.Table.from_pylist([{n: row.get(n) for n in names} for row in TABLE]), file)


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_manifests_say_the_same_in_every_form(here: Path, write: Any) -> None:
    file = here / f"manifest.{write.__name__.removeprefix('write_')}"
    write(file)
    rows = found(str(file), strength=0.9)
    assert [row.options.strength for row in rows] == [0.5, 0.9, 0.9]
    assert [row.options.rank for row in rows] == [None, "2", None]
    assert [row.options.method for row in rows] == ["auto", "lora-x", "auto"]
    assert rows[2].options.force
    assert [Path(row.target).name for row in rows] == ["new", "newer", "new"]
    assert [row.output for row in rows] == ["loras/a0", "loras/sub/a1", "named/it"]


WINDOWS = PureWindowsPath(r"C:\work\lib")


@pytest.mark.parametrize(
    ("adapter", "home", "name"),
    [
        (WINDOWS / "sub" / "a1.safetensors", WINDOWS, "sub/a1.safetensors"),
        (WINDOWS / "sub" / "a1.safetensors", PureWindowsPath("D:/other"), "a1.safetensors"),
        (PureWindowsPath("//host/share/a1"), WINDOWS, "a1"),
        (PureWindowsPath("C:/"), WINDOWS, "adapter"),
        (PurePosixPath("/lib/sub/a1"), PurePosixPath("/lib"), "sub/a1"),
        (PurePosixPath("/lib/sub/a1"), PurePosixPath("/li"), "a1"),
        # A name of one system that leads out on another.
        (PurePosixPath("/lib/..\\a1"), PurePosixPath("/lib"), "a1"),
        (PurePosixPath("/lib/\\a1"), PurePosixPath("/elsewhere"), "a1"),
        (PurePosixPath("/lib/C:a1"), PurePosixPath("/lib"), "a1"),
        (PurePosixPath("/lib/a\\.."), PurePosixPath("/lib"), "adapter"),
    ],
)
def test_an_adapters_name_has_slashes_on_every_system_and_leads_nowhere(
    adapter: PurePath, home: PurePath, name: str
) -> None:
    assert name_on_disk(adapter, home) == name


def test_a_manifest_above_the_current_folder_gives_the_same_names(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "m.csv").write_text("adapter\nloras/sub/a1\n")
    monkeypatch.chdir(here / "loras")
    assert [row.name for row in found("../m.csv")] == ["loras/sub/a1"]


def by_pandas(file: Path, columns: dict[str, list[Any]]) -> None:
    """As it writes a column of whole numbers with gaps: 1.0, NaN, 8.0."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"adapter": ["loras/a0", "loras/sub/a1", "loras/a2"], **columns})
    frame.to_parquet(file) if file.suffix == ".parquet" else frame.to_csv(file, index=False)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_whole_numbers_with_gaps_are_whole_and_shares_are_shares(here: Path, suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    file = here / f"m.{suffix}"
    gaps = [1, None, 8]
    by_pandas(file, {"rank": gaps, "n_inputs": [2, None, 64], "seed": gaps, "strength": gaps, "energy": [1, None, 0.5]})
    rows = found(str(file), method="lora-x")
    assert [row.options.settings().rank for row in rows] == [1, None, 8]
    assert not any(isinstance(row.options.settings().rank, float) for row in rows)
    assert [(row.options.n_inputs, row.options.seed) for row in rows] == [(2, 1), (None, 0), (64, 8)]
    assert [row.options.strength for row in rows] == [1.0, 1.0, 8.0]
    assert [row.options.method_options().get("energy") for row in rows] == [1.0, None, 0.5]
    # Among shares, 1.0 is one of them: all of it.
    by_pandas(file, {"rank": [1.0, None, 0.5], "subspace_rank": gaps})
    rows = found(str(file), method="lora-x")
    ranks = [row.options.settings().rank for row in rows]
    assert ranks == [1.0, None, 0.5]
    assert isinstance(ranks[0], float)
    assert [row.options.method_options().get("subspace_rank") for row in rows] == gaps


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("adapter,strenght\na,1\n", "strenght.*is no option.*strength"),
        ("adapter,strength\na,much\n", "row 1.*strength 'much'"),
        ("adapter,method\na,copy\nb,magic\n", "row 2.*magic"),
        ("adapter,output\na,../b\n", "leads out"),
        ("adapter,output\na,/b\n", "leads out"),
        ("adapter,rank\na,-1\n", "row 1.*rank"),
        ("adapter,n_inputs\na,1\n", "row 1.*n_inputs '1'"),
        ("name\na\n", "names no adapter"),
        ("adapter\na,b\n", "more cells"),
    ],
)
def test_a_manifest_that_is_wrong_is_told_by_row(here: Path, table: str, what: str) -> None:
    (here / "m.csv").write_text(table)
    with pytest.raises((InputError, UsageError), match=what):
        found("m.csv")


def test_every_option_of_a_row_is_one_of_the_command_as_port_has_it() -> None:
    from regraft.cli.batch import batch
    from regraft.cli.port import port

    of_port, of_batch = (inspect.signature(verb, eval_str=True).parameters for verb in (port, batch))
    # Given to `port` as what it is not to do.
    names = set(RowOptions.model_fields) - {"weights_only"}
    assert names <= set(of_batch)
    assert names <= set(of_port)
    for name in names:
        told = [found[name].annotation.__metadata__[0].param_decls for found in (of_port, of_batch)]
        assert told[0] == told[1]
        assert of_batch[name].default == of_port[name].default


@pytest.mark.parametrize(
    "given",
    [
        {"method": "lora-x", "subspace_rank": "3", "threshold": "0.1", "block_strength": "*=0.5", "rank": "4"},
        {"method": "lora-x", "energy": 0.9, "edge": 2.0},
        {"method": "effect", "pull": "0.5", "ridge": 0.1, "n_inputs": 7, "seed": 3},
        {"migration": "m.safetensors"},
    ],
)
def test_options_of_the_command_are_those_of_its_rows(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    seen: list[Row] = []

    def stop(rows: list[Row], *rest: Any, **more: Any) -> None:
        seen.extend(rows)
        raise UsageError("seen")

    monkeypatch.setattr("regraft.batch.run_batch", stop)
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert run("batch", "loras/a0", "--from", "old", "--to", "new", "--out", "out", *flags).code == 2
    (row,) = seen
    assert row.options.given() == given


def test_a_row_goes_by_a_migration_or_by_a_fit_and_the_nearer_word_counts(here: Path) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "m.safetensors").write_bytes(b"")
    (here / "sub" / "m.csv").write_text(
        "adapter,migration,method,energy\na,m.safetensors,,\nb,,,\nc,,lora-x,0.5\nd,org/name:m.safetensors,,\n"
    )
    own = str(here / "sub" / "m.safetensors")
    rows = expand(["sub/m.csv"], "old", "new", RowOptions(migration="theirs"))
    assert [row.options.migration for row in rows] == [own, "theirs", None, "org/name:m.safetensors"]
    (here / "auto.csv").write_text("adapter,migration,method\na,,auto\nb,,\nc,own.safetensors,auto\n")
    rows = expand(["auto.csv"], "old", "new", RowOptions(migration="theirs"))
    assert [row.options.migration for row in rows] == [None, "theirs", str(here / "own.safetensors")]
    rows = expand(["sub/m.csv"], "old", "new", RowOptions(method="lora-x", energy=0.9))
    assert [(row.options.migration, row.options.method) for row in rows[:3]] == [
        (own, "auto"),
        (None, "lora-x"),
        (None, "lora-x"),
    ]
    assert [row.options.energy for row in rows[:3]] == [None, 0.9, 0.5]
    (here / "m.csv").write_text("adapter,migration,method,energy\na,m.safetensors,lora-x,0.9\n")
    with pytest.raises(UsageError, match=r"row 1.*has its method: method, energy can't"):
        found("m.csv")


def test_what_is_missing_is_said(here: Path) -> None:
    (here / "empty").mkdir()
    for source, what in (("empty", "holds no adapter"), ("nothing.safetensors", "no such file"), ("x/*", "no adapter")):
        with pytest.raises(InputError, match=what):
            found(source)
    with pytest.raises(UsageError, match="no base to go to"):
        expand(["loras"], "old", None, RowOptions())
