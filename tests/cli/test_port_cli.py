from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import Run
from safetensors.torch import load_file

from regraft.report.json_schema import parse
from regraft.report.schema import CheckReport, PortReport
from toys import drifted, llama, lora, save_base


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an adapter, its base, an upgrade and an unrelated base."""
    monkeypatch.chdir(tmp_path)
    state = llama()
    save_base(state, tmp_path / "old.safetensors")
    save_base(drifted(state, 0.1), tmp_path / "new.safetensors")
    save_base(llama(5), tmp_path / "unrelated.safetensors")
    lora(state).save(tmp_path / "lora")
    return tmp_path


PAIR = ("--from", "old.safetensors", "--to", "new.safetensors")


def test_port_writes_the_file_and_the_record(here: Path, run: Run) -> None:
    ran = run("port", "lora", *PAIR, "-o", "out", "--json")
    assert ran.code == 0
    report = parse(PortReport, ran.out)
    assert report.counts.ported == 9
    assert report.method == "copy"
    assert [Path(file).name for file in report.outputs] == ["adapter_model.safetensors", "adapter_config.json"]
    assert (
        load_file(here / "out" / "adapter_model.safetensors").keys()
        == load_file(here / "lora" / "adapter_model.safetensors").keys()
    )
    config = json.loads((here / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "new.safetensors"


def test_check_writes_nothing_and_exits_zero_whatever_its_verdict(here: Path, run: Run) -> None:
    before = set(here.rglob("*"))
    survives = run("check", "lora", *PAIR, "--json")
    refused = run("check", "lora", "--from", "old.safetensors", "--to", "unrelated.safetensors", "--json")
    assert (survives.code, refused.code) == (0, 0)
    assert parse(CheckReport, survives.out).verdict == "survives"
    assert parse(CheckReport, refused.out).verdict == "refused"
    assert set(here.rglob("*")) == before


def test_fail_under_turns_the_verdict_into_an_exit_code(here: Path, run: Run) -> None:
    bad = ("--from", "old.safetensors", "--to", "unrelated.safetensors")
    assert run("check", "lora", *PAIR, "--fail-under", "survives").code == 0
    assert run("check", "lora", *bad, "--fail-under", "refine").code == 3
    assert run("check", "lora", *PAIR, "--fail-under", "nonsense").code == 2
    # Nothing is below it.
    assert run("check", "lora", *PAIR, "--fail-under", "refused").code == 2


def test_an_unrelated_base_exits_three_and_leaves_no_file(here: Path, run: Run) -> None:
    before = set(here.rglob("*"))
    ran = run("port", "lora", "--from", "old.safetensors", "--to", "unrelated.safetensors", "-o", "out")
    assert ran.code == 3
    assert "nothing to do with each other" in ran.err
    assert "--force" in ran.err
    assert set(here.rglob("*")) == before


def test_dry_run_prints_the_plan_that_the_real_run_follows(here: Path, run: Run) -> None:
    before = set(here.rglob("*"))
    planned = run("port", "lora", *PAIR, "--exclude", "*.0.*", "--dry-run", "--json")
    assert planned.code == 0
    assert set(here.rglob("*")) == before
    done = run("port", "lora", *PAIR, "--exclude", "*.0.*", "-o", "out", "--json")
    plan, report = parse(CheckReport, planned.out), parse(PortReport, done.out)
    assert [(m.name, m.target, m.status) for m in plan.modules] == [
        (m.name, m.target, m.status) for m in report.modules
    ]


def test_a_migration_saved_once_ports_without_either_checkpoint(here: Path, run: Run) -> None:
    assert run("port", "lora", *PAIR, "-m", "prolora", "-o", "direct", "--save-migration", "m.safetensors").code == 0
    for name in ("old.safetensors", "new.safetensors"):
        (here / name).unlink()
    ran = run("port", "lora", "--migration", "m.safetensors", "-o", "through", "--json")
    assert ran.code == 0
    direct, through = (load_file(here / name / "adapter_model.safetensors") for name in ("direct", "through"))
    assert all(direct[key].equal(through[key]) for key in direct)


def test_a_stale_migration_is_refused(here: Path, run: Run) -> None:
    run("port", "lora", *PAIR, "-o", "out", "--save-migration", "m.safetensors")
    ran = run("port", "lora", "--migration", "m.safetensors", "--to", "unrelated.safetensors", "-o", "other")
    assert ran.code == 3
    assert "fingerprint" in ran.err
    assert not (here / "other").exists()


def test_a_check_by_a_migration_looks_at_the_bases_that_it_is_given(here: Path, run: Run) -> None:
    run("port", "lora", *PAIR, "-o", "out", "--save-migration", "m.safetensors")
    assert run("check", "lora", "--migration", "m.safetensors", *PAIR).code == 0
    assert run("check", "lora", "--migration", "m.safetensors", "--to", "unrelated.safetensors").code == 3
    for more in (["--deep"], ["--method", "ridge"]):
        ran = run("check", "lora", "--migration", "m.safetensors", *more)
        assert ran.code == 2
        assert "a migration has its method" in ran.err


def test_the_cache_is_listed_and_cleared(here: Path, run: Run) -> None:
    run("port", "lora", *PAIR, "-m", "prolora", "-o", "out")
    first = load_file(here / "out" / "adapter_model.safetensors")
    listed = run("cache", "list", "--json").record["migrations"]
    assert [(row["method"], row["modules"]) for row in listed] == [("prolora", 9)]
    run("port", "lora", *PAIR, "-m", "prolora", "-o", "out", "--overwrite")
    again = load_file(here / "out" / "adapter_model.safetensors")
    assert all(first[key].equal(again[key]) for key in first)
    assert run("cache", "clear").code == 0
    assert run("cache", "list", "--json").record["migrations"] == []


def test_the_cache_does_not_hide_that_the_target_contains_the_adapter(here: Path, run: Run) -> None:
    state, adapter = llama(), lora(llama())
    merged = drifted(state, 0.1)
    for ref, update in adapter.updates.items():
        merged[f"{ref.path}.weight"] = merged[f"{ref.path}.weight"] + update.delta()
    save_base(merged, here / "merged.safetensors")
    lora(state, seed=8).save(here / "other")
    bases = ("--from", "old.safetensors", "--to", "merged.safetensors")
    assert run("port", "other", *bases, "-o", "fine").code == 0
    assert run("port", "lora", *bases, "-o", "bad").code == 3


def test_report_is_one_page_without_network(here: Path, run: Run) -> None:
    assert run("port", "lora", *PAIR, "-o", "out", "--report", "page.html").code == 0
    page = (here / "page.html").read_text(encoding="utf-8")
    assert "9 of 9 modules ported" in page
    assert 'src="http' not in page


def test_quiet_prints_nothing(here: Path, run: Run) -> None:
    ran = run("port", "lora", *PAIR, "-o", "out", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_save_dtype_rank_strength_and_format_change_the_output(here: Path, run: Run) -> None:
    flags = ("--save-dtype", "float16", "--rank", "2", "--strength", "0.5")
    ran = run("port", "lora", *PAIR, "-o", "out", "--json", *flags)
    assert ran.code == 0
    tensors = load_file(here / "out" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float16"}
    assert {min(tensor.shape) for tensor in tensors.values()} == {2}
    rows = parse(PortReport, ran.out).modules
    assert all(row.rank_out == 2 and 0 < row.cut_loss < 1 for row in rows)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--method", "nonsense"), "Known methods"),
        (("--method", "copy", "--energy", "0.5"), "no option 'energy'"),
        (("--method", "lora-x", "--energy", "1.5"), "out of range"),
        (("--method", "lora-x", "--subspace-rank", "-3"), "--subspace-rank"),
        (("--rank", "many"), "--rank"),
        (("--device", "tpu"), "Known: cpu, cuda, mps"),
        (("--save-dtype", "int3"), "Known"),
        (("--block-strength", "1,2,3"), "numbers does not fit"),
        (("--block-strength", "a=b"), "can't be read"),
        (("--format", "nonsense"), "Known formats"),
    ],
)
def test_a_wrong_option_is_a_usage_error_that_says_what_is_right(
    here: Path, run: Run, flags: tuple[str, ...], told: str
) -> None:
    ran = run("port", "lora", *PAIR, "-o", "out", *flags)
    assert ran.code == 2
    assert told in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert not (here / "out").exists()


def test_missing_options_are_usage_errors(here: Path, run: Run) -> None:
    assert run("port", "lora", *PAIR).code == 2
    assert run("port", "lora", "--from", "old.safetensors", "-o", "out").code == 2
    assert run("check", "lora").code == 2
    assert run("port").code == 2


def test_methods_as_json_have_the_promised_fields(run: Run) -> None:
    rows = json.loads(run("methods", "--json").out)
    assert {"auto", "copy", "lora-x", "procrustes", "prolora"} <= {row["name"] for row in rows}
    for row in rows:
        assert {"name", "reference", "summary", "needs", "scope", "tier"} <= row.keys()
