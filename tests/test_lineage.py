from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from regraft import (
    InputError,
    OutputError,
    Refused,
    Settings,
    UsageError,
    load_adapter,
    load_migration,
    open_base,
    port,
)
from regraft.base import Base
from regraft.formats._hashes import with_true_hashes
from regraft.lineage import KEY, lineage_of, parse_lineage, ports_of
from regraft.lineage.name_sets import compact, expand
from regraft.lineage.stamp import stamp
from regraft.report.schema import Interval, VerifyReport
from toys import drifted, llama, lora, save_base

BASE = {"fingerprint": "v1:0123456789abcdef01234567-89abcdef"}


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Base, Base]:
    state = llama()
    return (
        open_base(save_base(state, tmp_path / "old.safetensors")),
        open_base(save_base(drifted(state, 0.1), tmp_path / "new.safetensors")),
    )


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as handle:
        return handle.metadata()


def data_section(file: Path) -> bytes:
    raw = file.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


# Sets of names


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["a.0.q", "a.1.q", "a.2.q", "a.0.v", "a.1.v", "a.2.v"], ["a.{0-2}.{q,v}"]),
        (["a.0", "a.2"], ["a.{0,2}"]),
        (["a.00", "a.1"], ["a.{1,00}"]),
        (["a.0-3", "a.b"], ["a.{0%2D3,b}"]),
        (["a.{x}", "a.1,2", "50%"], ["50%25", "a.{%7Bx%7D,1%2C2}"]),
        (["one"], ["one"]),
        ([], []),
    ],
)
def test_names_are_written_in_a_few_patterns_and_read_back(names: list[str], patterns: list[str]) -> None:
    assert compact(names) == patterns
    assert sorted(expand(patterns)) == sorted(names)


def test_any_set_of_names_comes_back_whatever_its_order() -> None:
    draw = random.Random(5)
    words = ["q", "v", "0", "1", "2", "10", "0-1", "{", "a,b", "%7B", "ä"]
    for _ in range(200):
        names = {".".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(draw.randint(0, 12))}
        shuffled = draw.sample(sorted(names), len(names))
        patterns = compact(shuffled)
        assert sorted(expand(patterns)) == sorted(names)
        assert patterns == compact(names)


def test_a_whole_unet_is_a_few_dozen_patterns() -> None:
    from regraft.families import get_family

    family = get_family("sdxl")
    assert family is not None
    names = list(family.tables["unet"])
    assert len(compact(names)) < 50
    assert sorted(expand(compact(names))) == sorted(names)


# Versions


def test_members_that_are_not_known_survive_a_port(bases: tuple[Base, Base]) -> None:
    """A later minor version's additions are kept, at every level, and so is its version."""
    later = {"version": "1.7", "base": {**BASE, "shade": 1}, "ports": [], "watermark": {"deep": [1, {"x": None}]}}
    adapter = replace(lora(llama()), metadata={KEY: json.dumps(later)})
    found = lineage_of(port(adapter, *bases, settings=Settings(force=True)).adapter)
    assert (found["version"], found["watermark"]) == ("1.7", later["watermark"])
    again = {**later, "ports": [{"from": None, "to": {**BASE, "shade": 2}, "method": "copy", "mood": "good"}]}
    adapter = replace(lora(llama()), metadata={KEY: json.dumps(again)})
    first, second = ports_of(port(adapter, *bases, settings=Settings(force=True)).adapter)
    assert first == again["ports"][0]
    assert second["to"]["fingerprint"] == bases[1].fingerprint


def test_the_sketch_of_a_quantised_base_is_a_valid_one() -> None:
    sketch = "s1:model:F32,bnb nf4:xwSgvjow"
    lineage = parse_lineage(json.dumps({"version": "1.0", "base": {**BASE, "sketch": sketch}, "ports": []}))
    assert lineage["base"]["sketch"] == sketch


def test_a_later_major_version_is_not_guessed_at(bases: tuple[Base, Base], tmp_path: Path) -> None:
    text = json.dumps({"version": "2.0", "root": "something new"})
    with pytest.raises(InputError, match=r"of version 2\.0, which is later\. Update regraft"):
        parse_lineage(text)
    adapter = replace(lora(llama()), metadata={KEY: text})
    with pytest.raises(InputError, match="Update regraft"):
        port(adapter, *bases)
    # A conversion changes nothing that it would have to understand: the entry goes along.
    adapter.save(tmp_path / "kept")
    assert metadata(tmp_path / "kept" / "adapter_model.safetensors")[KEY] == text


def test_version_zero_is_read_as_version_one(bases: tuple[Base, Base]) -> None:
    """What regraft 0.1 wrote before there was a specification."""
    old = {
        "from": "v0:aaaaaaaa",
        "to": "v0:bbbbbbbb",
        "family": "llama",
        "method": "copy",
        "options": {},
        "strength": 0.5,
        "block_strength": [],
        "rank": None,
        "ported": 1,
        "skipped": {"layers.0.q": "no counterpart", "layers.1.q": "no counterpart"},
        "forced": False,
        "verdict": "survives",
        "regraft": "0.1.0",
    }
    adapter = replace(lora(llama()), metadata={KEY: json.dumps({"version": 0, "ports": [old]})})
    found = lineage_of(adapter)
    assert found["version"] == "1.0"
    assert found["base"] == {"fingerprint": "v0:bbbbbbbb", "family": "llama"}
    (entry,) = found["ports"]
    assert (entry["from"]["fingerprint"], entry["strength"], entry["tool"]) == ("v0:aaaaaaaa", 0.5, "regraft 0.1.0")
    assert entry["lost"] == [{"status": "skipped", "reason": "no counterpart", "modules": {"*": ["layers.{0-1}.q"]}}]
    with pytest.raises(Refused, match="port of a port"):
        port(adapter, *bases)


@pytest.mark.parametrize("ports", [None, {}, [], ["x"], [{"from": 5, "strength": "x"}]])
def test_a_damaged_version_zero_is_named(ports: object) -> None:
    with pytest.raises(InputError, match="regraft_lineage"):
        parse_lineage(json.dumps({"version": 0, "ports": ports}))


def test_more_ports_than_anybody_makes_are_an_error() -> None:
    entry = {"from": BASE, "to": BASE, "method": "copy"}
    parse_lineage(json.dumps({"version": "1.0", "base": BASE, "ports": [entry] * 256}))
    with pytest.raises(InputError, match="256 items"):
        parse_lineage(json.dumps({"version": "1.0", "base": BASE, "ports": [entry] * 257}))


def test_a_text_of_many_megabytes_is_rejected_by_its_length() -> None:
    with pytest.raises(InputError, match="longer than"):
        parse_lineage('{"version":"1.0","x":"' + "a" * (9 << 20) + '"}')


# What a port records


def test_a_port_tells_what_was_kept_and_lost(bases: tuple[Base, Base]) -> None:
    old, new = bases
    adapter = lora(llama())
    only = Settings(force=True, strength=0.5)
    found = lineage_of(port(adapter, old, new, "lora-x", energy=0.5, settings=only).adapter)
    (entry,) = found["ports"]
    assert (entry["from"]["fingerprint"], entry["to"]["fingerprint"]) == (old.fingerprint, new.fingerprint)
    assert found["base"] == entry["to"]
    assert (entry["method"], entry["options"]["energy"], entry["strength"]) == ("lora-x", 0.5, 0.5)
    kept = [name for group in entry["kept"] for name in expand(group["modules"]["model"])]
    assert sorted(kept) == sorted(ref.path for ref in adapter.updates)
    assert all(0 < group["energy"] < 1 for group in entry["kept"])
    assert "lost" not in entry


def test_a_port_names_no_folder(bases: tuple[Base, Base], tmp_path: Path) -> None:
    assert str(tmp_path) not in port(lora(llama()), *bases).adapter.metadata[KEY]


def test_modules_kinds_and_conventions_are_true_of_the_file_that_is_written(
    bases: tuple[Base, Base], tmp_path: Path
) -> None:
    """The same port as a PEFT folder, as its bare weights, and with rsLoRA: the convention is each file's own."""
    ported = port(lora(llama(), dora=True), *bases).adapter
    ported.save(tmp_path / "folder")
    (group,) = lineage_of(load_adapter(tmp_path / "folder"))["updates"]
    assert (group["kind"], group["scale"], group["axis"]) == ("dora", "alpha/rank", "output")
    assert group["modules"]["model"] == [
        "model.layers.{0-2}.mlp.down_proj",
        "model.layers.{0-2}.self_attn.{q_proj,v_proj}",
    ]
    bare = replace(ported, layout={**ported.layout, "bare": True}, config=None)
    bare.save(tmp_path / "bare.safetensors")
    assert lineage_of(load_adapter(tmp_path / "bare.safetensors"))["updates"][0]["scale"] == "one"


def test_a_port_through_a_file_names_the_file_by_its_hash(
    bases: tuple[Base, Base], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hashlib import sha256

    monkeypatch.chdir(tmp_path)
    lora(llama()).save(tmp_path / "lora")
    pair = ("--from", "old.safetensors", "--to", "new.safetensors")
    assert run("port", "lora", *pair, "-o", "one", "--save-migration", "m.safetensors").code == 0
    assert run("port", "lora", "--migration", "m.safetensors", "-o", "two").code == 0
    wanted = [f"sha256:{sha256(Path('m.safetensors').read_bytes()).hexdigest()}"]
    for name in ("one", "two"):
        assert ports_of(load_adapter(tmp_path / name))[0]["migrations"] == wanted


# Stamping


def test_a_stamp_adds_the_lineage_and_nothing_else(bases: tuple[Base, Base], tmp_path: Path) -> None:
    lora(llama()).save(tmp_path / "lora")
    source = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(source)
    trained = with_true_hashes({"ss_tag_frequency": "{}", "sshs_model_hash": "", "sshs_legacy_hash": ""}, tensors)
    save_file(tensors, source, metadata={"format": "pt", "modelspec.title": "mine", **trained})
    stamp(tmp_path / "lora", bases[0], tmp_path / "stamped")
    result = tmp_path / "stamped" / "adapter_model.safetensors"
    assert data_section(result) == data_section(source)
    before, after = metadata(source), metadata(result)
    assert {key: value for key, value in after.items() if key != KEY} == before
    # The trainer's own hashes of its tensors are still true, by the trainer's own rule.
    assert with_true_hashes(after, load_file(result)) == after
    names = {file.name for file in (tmp_path / "lora").iterdir()}
    assert {file.name for file in (tmp_path / "stamped").iterdir()} == names
    found = lineage_of(load_adapter(tmp_path / "stamped"))
    assert (found["base"]["fingerprint"], found["ports"]) == (bases[0].fingerprint, [])


def test_a_stamp_is_the_same_bytes_each_time(bases: tuple[Base, Base], tmp_path: Path) -> None:
    lora(llama()).save(tmp_path / "lora")
    files = []
    for name in ("a", "b"):
        stamp(tmp_path / "lora", bases[0], tmp_path / name)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_stamp_is_refused_where_it_would_be_untrue(bases: tuple[Base, Base], tmp_path: Path) -> None:
    lora(llama()).save(tmp_path / "lora")
    stranger = {f"blocks.{i}.weight": torch.randn(4, 4) for i in range(4)}
    with pytest.raises(Refused, match="most of the adapter's modules do not fit"):
        stamp(tmp_path / "lora", open_base(save_base(stranger, tmp_path / "s.safetensors")), tmp_path / "out")
    stamp(tmp_path / "lora", bases[0], tmp_path / "once")
    with pytest.raises(InputError, match="has a lineage already"):
        stamp(tmp_path / "once", bases[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_verbs_show_validate_and_stamp(
    bases: tuple[Base, Base], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lora(llama()).save(tmp_path / "lora")
    none = run("lineage", "show", "lora")
    assert (none.code, "lineage stamp" in none.err) == (1, True)
    assert run("lineage", "stamp", "lora", "--base", "old.safetensors", "--in-place").code == 0
    assert "lora: 9 modules, factor alpha/rank" in run("lineage", "show", "lora").out
    weights = Path("lora/adapter_model.safetensors")
    broken = {**metadata(weights), KEY: '{"version":"1.0"}'}
    save_file(load_file(weights), "broken.safetensors", metadata=broken)
    checked = run("lineage", "validate", "lora", "broken.safetensors", "--json")
    assert checked.code == 1
    assert [row["valid"] for row in checked.record["files"]] == [True, False]
    assert "base: Field required" in checked.record["files"][1]["fault"]
    for wrong in (
        ("--in-place",),
        ("--base", "old.safetensors"),
        ("--base", "old.safetensors", "--in-place", "-o", "x"),
    ):
        assert run("lineage", "stamp", "lora", *wrong).code == 2


def test_measured_figures_join_the_last_port(
    bases: tuple[Base, Base], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lora(llama()).save(tmp_path / "lora")
    port(load_adapter("lora"), *bases).adapter.save(tmp_path / "ported")
    figure = Interval(mean=0.9, low=0.85, high=0.95)
    record = VerifyReport(
        original="a", ported="b", source="old", target="new", model_class="LlamaForCausalLM", n_inputs=64,
        inputs="texts that the old model wrote", effect_cosine=figure, effect_norm_ratio=figure, controls={},
        summary="", seconds=1.0,
    )  # fmt: skip
    Path("verified.json").write_text(record.to_json())
    assert run("lineage", "stamp", "ported", "--measured", "verified.json", "-o", "told", "--json").code == 0
    cosine, _ = ports_of(load_adapter("told"))[0]["fidelity"]
    assert (cosine["measure"], cosine["value"], cosine["low"], cosine["inputs"]) == ("effect_cosine", 0.9, 0.85, 64)
    assert "texts that the old model wrote" in cosine["how"]
    assert "effect_cosine 0.9" in run("lineage", "show", "told").out
    assert run("lineage", "stamp", "lora", "--measured", "verified.json", "-o", "x").code == 1
    pair = ("--from", "old.safetensors", "--to", "new.safetensors", "--measured", "verified.json")
    assert run("migration", "make", *pair, "-o", "m.safetensors", "-q").code == 0
    assert load_migration("m.safetensors").measured[0] == cosine


def test_a_port_by_the_cache_tells_the_same_as_the_first(
    bases: tuple[Base, Base], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lora(llama()).save(tmp_path / "lora")
    pair = ("--from", "old.safetensors", "--to", "new.safetensors", "-m", "prolora", "--quiet")
    for name in ("fitted", "cached"):
        assert run("port", "lora", *pair, "-o", name).code == 0
    first, second = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("fitted", "cached"))
    assert first == second


def test_a_bare_file_is_stamped_into_a_file_and_in_place(bases: tuple[Base, Base], tmp_path: Path) -> None:
    ported = replace(lora(llama()), layout={"bare": True})
    ported.save(tmp_path / "lora.safetensors")
    before = (tmp_path / "lora.safetensors").read_bytes()
    stamp(tmp_path / "lora.safetensors", bases[0], tmp_path / "out.safetensors")
    assert (tmp_path / "lora.safetensors").read_bytes() == before
    stamp(tmp_path / "lora.safetensors", bases[0], tmp_path / "lora.safetensors", overwrite=True)
    assert (tmp_path / "lora.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_stamp_can_carry_the_hash_of_every_byte(bases: tuple[Base, Base], tmp_path: Path) -> None:
    lora(llama()).save(tmp_path / "lora")
    found = stamp(tmp_path / "lora", bases[0], tmp_path / "out", exact=True)
    assert found["base"]["content"] == {"model": bases[0].exact_prints().components["model"].content}


def test_what_can_not_be_stamped_is_told_with_the_remedy(bases: tuple[Base, Base], tmp_path: Path) -> None:
    lora(llama()).save(tmp_path / "lora")
    with pytest.raises(UsageError, match="a folder into a folder"):
        stamp(tmp_path / "lora", bases[0], tmp_path / "out.safetensors")
    with pytest.raises(OutputError, match="exists already"):
        stamp(tmp_path / "lora", bases[0], tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    torch.save(weights, tmp_path / "lora.bin")
    with pytest.raises(InputError, match="regraft convert"):
        stamp(tmp_path / "lora.bin", bases[0], tmp_path / "out.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"lora", "lora.bin", "old.safetensors", "new.safetensors"}


def test_an_adapter_of_another_base_than_it_says_is_refused(bases: tuple[Base, Base], tmp_path: Path) -> None:
    """A drifted version has the same names and shapes: only the lineage knows which of the two the adapter is for."""
    old, new = bases
    lora(llama()).save(tmp_path / "lora")
    stamp(tmp_path / "lora", old, tmp_path / "stamped")
    adapter = load_adapter(tmp_path / "stamped")
    assert port(adapter, old, new).report.verdict == "survives"
    with pytest.raises(Refused, match=r"lineage says that it is for old\.safetensors .* old base is new\.safetensors"):
        port(adapter, new, old)
    half = {name: tensor.half() for name, tensor in llama().items()}
    assert port(adapter, open_base(save_base(half, tmp_path / "half.safetensors")), new).report.verdict == "survives"
