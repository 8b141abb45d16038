"""Which base an adapter was made for: by hashes that this test computes itself, by fingerprint, by name."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import Run
from safetensors.torch import save_file

import regraft.filehash
from regraft import Adapter, InputError, ModuleRef, UsageError, load_adapter, open_base, port
from regraft.filehash import file_hashes, legacy_hash
from regraft.identify import clues_of, identify_base
from regraft.lineage import KEY
from toys import StateDict, drifted, llama, lora, save_base

Bases = dict[str, Path]


@pytest.fixture(scope="module")
def state() -> StateDict:
    # Above 1 MiB + 64 KiB, so that the legacy hash reads something.
    return llama(layers=3, width=128, mlp=200)


@pytest.fixture(scope="module")
def bases(state: StateDict, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    folder = tmp_path_factory.mktemp("models")
    made = {"v1": state, "v2": drifted(state, 0.1), "v3": llama(9, layers=3, width=128, mlp=200)}
    return {name: save_base(tensors, folder / f"{name}.safetensors") for name, tensors in made.items()}


def saying(state: StateDict, **metadata: str) -> Adapter:
    return replace(lora(state), metadata=metadata)


def hashes(file: Path) -> dict[str, str]:
    raw = file.read_bytes()
    assert len(raw) > 0x110000
    return {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "legacy": hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8],
        "autov2": hashlib.sha256(raw).hexdigest()[:10],
        "autov3": hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()[:12],
    }


@pytest.mark.parametrize(
    ("key", "kind", "match"),
    [
        ("ss_new_sd_model_hash", "sha256", "exact"),
        ("ss_sd_model_hash", "legacy", "likely"),
        ("ss_sd_model_hash", "autov2", "exact"),
        ("ss_sd_model_hash", "autov3", "exact"),
    ],
)
def test_a_base_is_found_by_each_hash_of_the_field(
    state: StateDict, bases: Bases, key: str, kind: str, match: str
) -> None:
    for name, file in bases.items():
        report = identify_base(saying(state, **{key: hashes(file)[kind]}), list(bases.values()))
        assert report.found == str(file), name
        assert [candidate.match for candidate in report.candidates] == [match, "other", "other"]


def test_two_files_with_one_legacy_hash_are_told_apart_by_the_new_one(
    state: StateDict, bases: Bases, tmp_path: Path
) -> None:
    raw = bytearray(bases["v1"].read_bytes())
    raw[-4:] = b"\0\0\0\0"
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(raw)
    one = hashes(bases["v1"])
    assert hashes(twin)["legacy"] == one["legacy"]
    both = [twin, bases["v1"]]
    assert identify_base(saying(state, ss_sd_model_hash=one["legacy"]), both).found is None
    told = saying(state, ss_sd_model_hash=one["legacy"], ss_new_sd_model_hash=one["sha256"])
    assert identify_base(told, both).found == str(bases["v1"])


def test_the_legacy_hash_spares_a_whole_read_of_the_others(
    state: StateDict, bases: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    plain = regraft.filehash.computed_hashes
    monkeypatch.setattr(regraft.filehash, "computed_hashes", lambda file: (read.append(file), plain(file))[1])
    one = hashes(bases["v2"])
    told = saying(state, ss_sd_model_hash=one["legacy"], ss_new_sd_model_hash=one["sha256"])
    assert identify_base(told, list(bases.values())).found == str(bases["v2"])
    assert read == [bases["v2"]]
    assert identify_base(told, list(bases.values())).found == str(bases["v2"])
    assert read == [bases["v2"]], "the second time, the hash is remembered"


def test_a_remembered_hash_is_not_used_for_a_file_that_changed(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, file)
    assert file_hashes(file).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    save_file({"a": torch.zeros(3)}, file)
    os.utime(file, ns=(1, 1))
    assert file_hashes(file).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    save_file({}, file)
    assert file_hashes(file).data == hashlib.sha256(b"").hexdigest()
    other = tmp_path / "x.ckpt"
    other.write_bytes(b"\x10\0\0\0\0\0\0\0 and more")
    assert file_hashes(other) == regraft.filehash.FileHashes(hashlib.sha256(other.read_bytes()).hexdigest(), None)


@pytest.mark.parametrize("value", ["None", "NOFILE", "IsADirectory", "", "e3b0c442", "not a hash"])
def test_what_says_nothing_is_no_clue(state: StateDict, bases: Bases, value: str) -> None:
    adapter = saying(state, ss_sd_model_hash=value, ss_new_sd_model_hash=value, ss_sd_model_name="None")
    assert clues_of(adapter) == []
    report = identify_base(adapter, list(bases.values()))
    assert report.found is None
    assert {candidate.match for candidate in report.candidates} == {"possible"}
    assert "says nothing of its base" in report.summary


def test_the_hash_of_a_small_file_is_that_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "small.ckpt").write_bytes(b"x" * 1000)
    assert legacy_hash(tmp_path / "small.ckpt") == hashlib.sha256(b"").hexdigest()[:8]


def test_an_adapters_own_hash_is_not_taken_for_its_bases(state: StateDict, bases: Bases) -> None:
    own = hashes(bases["v1"])["sha256"]
    assert clues_of(saying(state, sshs_model_hash=own, **{"modelspec.hash_sha256": f"0x{own}"})) == []


def test_a_name_is_believed_only_while_no_hash_speaks_against_it(state: StateDict, bases: Bases) -> None:
    named = saying(state, ss_sd_model_name="v2.safetensors")
    assert identify_base(named, list(bases.values())).found == str(bases["v2"])
    lying = saying(state, ss_sd_model_name="v2.safetensors", ss_new_sd_model_hash=hashes(bases["v3"])["sha256"])
    assert identify_base(lying, list(bases.values())).found == str(bases["v3"])
    assert identify_base(lying, [bases["v1"], bases["v2"]]).found is None


def test_a_peft_adapter_is_matched_by_the_hubs_name_and_revision(state: StateDict, tmp_path: Path) -> None:
    places = {}
    for name, revision in (("org--model", "a" * 40), ("org--model", "b" * 40), ("org--other", "a" * 40)):
        folder = tmp_path / f"models--{name}" / "snapshots" / revision
        save_base(state, folder / "model.safetensors")
        places[name, revision[0]] = folder
    config = {"base_model_name_or_path": "org/model", "revision": "b" * 40}
    report = identify_base(replace(lora(state), config=config), list(places.values()))
    assert report.found == str(places["org--model", "b"])
    told = {candidate.path: candidate.evidence for candidate in report.candidates}
    assert "but at revision" in told[str(places["org--model", "a"])][0]


def test_a_ported_adapter_is_known_by_its_lineage_and_not_by_its_trainers_hash(
    state: StateDict, bases: Bases, tmp_path: Path
) -> None:
    trained = saying(state, ss_new_sd_model_hash=hashes(bases["v1"])["sha256"])
    ported = port(trained, open_base(bases["v1"]), open_base(bases["v2"])).adapter
    assert KEY in ported.metadata
    assert identify_base(ported, list(bases.values())).found == str(bases["v2"])


def test_a_sketch_in_the_lineage_finds_the_same_weights_in_another_dtype(
    state: StateDict, bases: Bases, tmp_path: Path
) -> None:
    half = save_base({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.safetensors")
    base = open_base(bases["v1"])
    lineage = {"version": "1.0", "base": {"fingerprint": base.fingerprint, "sketch": base.prints.brief()}, "ports": []}
    adapter = saying(state, **{KEY: json.dumps(lineage)})
    report = identify_base(adapter, [bases["v2"], bases["v3"], half])
    assert (report.found, report.candidates[0].match) == (str(half), "same")
    drifts = {candidate.path: candidate.evidence for candidate in report.candidates}
    assert "another version, drift" in " ".join(drifts[str(bases["v2"])])
    assert "unrelated weights" in " ".join(drifts[str(bases["v3"])])


def test_a_base_of_another_architecture_is_unfit_and_a_broken_one_is_told(state: StateDict, tmp_path: Path) -> None:
    other = save_base(llama(layers=3, width=64), tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    report = identify_base(lora(state), [other, tmp_path / "broken.safetensors"])
    assert report.found is None
    assert [candidate.match for candidate in report.candidates] == ["unfit", "unfit"]
    assert "can't be read" in report.candidates[1].evidence[0]


def test_the_verb_looks_into_a_folder_of_models(state: StateDict, bases: Bases, tmp_path: Path, run: Run) -> None:
    adapter = saying(state, ss_new_sd_model_hash=hashes(bases["v2"])["sha256"])
    file = tmp_path / "lora"
    adapter.save(file, format="peft")
    told = load_adapter(file)
    assert told.metadata["ss_new_sd_model_hash"]
    ran = run("identify", file, bases["v2"].parent, "--json")
    assert ran.code == 0
    assert ran.record["found"] == str(bases["v2"])
    assert len(ran.record["candidates"]) == 3
    table = run("identify", file, bases["v2"].parent)
    assert table.out.startswith(f"It was made for {bases['v2']}")
    assert run("identify", file, bases["v2"].parent, "--quiet").out == ""
    assert run("identify", file, tmp_path / "nowhere").code == 1


def test_no_candidate_or_a_folder_without_a_base_is_an_error(state: StateDict, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        identify_base(lora(state), [])
    with pytest.raises(InputError, match="holds no base"):
        identify_base(lora(state), [tmp_path])


def test_an_adapter_of_one_component_fits_every_base_that_has_it(state: StateDict, tmp_path: Path) -> None:
    def pipeline(name: str, unet: StateDict, text: StateDict) -> Path:
        save_base(unet, tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
        save_base(text, tmp_path / name / "text_encoder" / "model.safetensors")
        return tmp_path / name

    moved = drifted(state, 0.1)
    made_for = open_base(pipeline("made_for", state, llama(1, width=64)))
    places = [pipeline("other", moved, llama(1, width=64)), pipeline("same_unet", state, llama(2, width=64))]
    places.append(save_base(state, tmp_path / "unet_alone.safetensors"))
    samples = {name: part.sample for name, part in made_for.prints.components.items()}
    lineage = {"version": "1.0", "base": {"fingerprint": made_for.fingerprint, "components": samples}, "ports": []}
    plain = lora(state)
    updates = {ModuleRef("unet", ref.path): update for ref, update in plain.updates.items()}
    report = identify_base(replace(plain, updates=updates, metadata={KEY: json.dumps(lineage)}), places)
    assert {Path(found.path).name: found.match for found in report.candidates} == {
        "same_unet": "exact",
        "unet_alone.safetensors": "exact",
        "other": "other",
    }
