"""Hub ids: what is read, how much of it, and what is said when the hub refuses."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import COMMIT, Fault, Hub
from running import Run
from safetensors.torch import save, save_file

from regraft import Adapter, InputError, ModuleRef, load_adapter, open_base, port
from regraft.adapter import MODEL
from regraft.families import module_names
from regraft.hub import HubId, hub_id_of
from regraft.hub.repository import download_runnable
from toys import StateDict, deltas, drifted, llama, lora, save_base

CONFIG = json.dumps({"model_type": "llama", "hidden_size": 24}).encode()


def files_of(state: StateDict, name: str = "model.safetensors") -> dict[str, bytes]:
    return {"config.json": CONFIG, name: save(state), "README.md": b"A model."}


def adapter_files(adapter: Adapter, folder: Path) -> dict[str, bytes]:
    adapter.save(folder, format="peft", overwrite=True)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def line(given: str, **how: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_base(given, **how)
    text = str(caught.value)
    assert "\n" not in text
    assert "hf_averysecret" not in text
    assert "SIGNED" not in text
    return text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("org/name@main:model.safetensors", HubId("org/name", "main", "model.safetensors")),
        ("org/name:unet/x.safetensors", HubId("org/name", None, "unet/x.safetensors")),
        ("org/name:unet/", HubId("org/name", None, "unet")),
        ("org/name.safetensors", None),
        ("a/b/c", None),
        ("name", None),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("~/name", None),
        ("C:/models", None),
        ("org/name@", None),
        ("org/name:", None),
        ("", None),
    ],
)
def test_what_is_a_hub_id_and_what_a_path(text: str, wanted: HubId | None) -> None:
    assert hub_id_of(text) == wanted
    assert hub_id_of(Path(text)) in (wanted, hub_id_of(str(Path(text))))


def test_a_local_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    hub.repos["org/name"] = files_of(llama(1))
    state = llama(0)
    save_base(state, tmp_path / "org" / "name" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    base = open_base("org/name")
    assert torch.equal(base.weight(ModuleRef(MODEL, "lm_head")), state["lm_head.weight"])
    assert hub.requests == []


@pytest.mark.parametrize("given", ["org/name", "org/name@v2", f"org/name@{COMMIT}", "org/name:model.safetensors"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_base_is_the_same_by_any_way(hub: Hub, given: str, whole: bool) -> None:
    hub.revisions["v2"] = COMMIT
    state = llama()
    hub.repos["org/name"] = files_of(state)
    base = open_base(given, whole=whole)
    for name, tensor in state.items():
        ref = base.components[MODEL][name]
        assert torch.equal(ref.load(), tensor)
        assert ref.shape == tuple(tensor.shape)
    assert base.partial is not whole
    assert str(base.path).startswith(given if not whole else str(Path(base.path.root)))
    if ":" not in given:
        assert base.configs[MODEL]["model_type"] == "llama"


def test_a_base_of_shards_and_one_of_components_are_read_in_part(hub: Hub) -> None:
    state = llama()
    names = sorted(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    shards = {file: save({name: state[name] for name in held}) for file, held in parts.items()}
    hub.repos["org/shards"] = {**shards, "model.safetensors.index.json": json.dumps(index).encode()}
    whole = {**files_of(state, "unet/diffusion_pytorch_model.safetensors"), "model_index.json": b"{}"}
    hub.repos["org/pipeline"] = {**whole, "text_encoder/model.fp16.safetensors": save(llama(2))}
    for given in ("org/shards", "org/shards:model.safetensors.index.json"):
        assert torch.equal(open_base(given, whole=False).components[MODEL][names[3]].load(), state[names[3]])
    for given, component in (("org/pipeline", "unet"), ("org/pipeline:unet", MODEL)):
        base = open_base(given, whole=False)
        assert torch.equal(base.components[component]["lm_head.weight"].load(), state["lm_head.weight"])
    assert set(open_base("org/pipeline", whole=False).components) == {"unet", "text_encoder"}
    local = open_base("org/pipeline")
    assert set(local.components) == {"unet", "text_encoder"}
    assert local.path.parts[-3:] == ("models--org--pipeline", "snapshots", COMMIT)


def test_the_fingerprint_is_that_of_the_file_at_hand(hub: Hub, tmp_path: Path) -> None:
    state = llama()
    hub.repos["org/name"] = files_of(state)
    local = open_base(save_base(state, tmp_path / "m.safetensors"))
    remote = open_base("org/name", whole=False)
    assert remote.fingerprint == local.fingerprint
    assert remote.prints.to_json() == local.prints.to_json()


@cache
def wide(seed: int = 0) -> StateDict:
    """Wide enough that 32 rows of a weight are a small part of it."""
    return {name: t.half() for name, t in llama(seed, layers=2, width=640, mlp=896).items()}


def test_a_check_on_the_hub_reads_a_small_share_and_judges_as_a_whole_read_does(
    hub: Hub, tmp_path: Path, run: Run
) -> None:
    old = wide()
    new = {name: t.half() for name, t in drifted({n: t.float() for n, t in old.items()}, 0.1).items()}
    hub.repos["org/v1"], hub.repos["org/v2"] = files_of(old), files_of(new)
    made = lora({name: tensor.float() for name, tensor in old.items()}, rank=2)
    hub.repos["me/lora"] = adapter_files(made, tmp_path / "lora")
    ran = run("check", "me/lora", "--from", "org/v1", "--to", "org/v2", "--json")
    assert ran.code == 0, ran.err
    weights = sum(len(hub.repos[name]["model.safetensors"]) for name in ("org/v1", "org/v2"))
    # 32 rows of 640 or 896 of each module that it touches, the fingerprint's samples, the headers.
    share = (hub.sent - len(hub.repos["me/lora"]["adapter_model.safetensors"])) / weights
    assert share < 0.08
    paths = {name: save_base(state, tmp_path / f"{name}.safetensors") for name, state in (("v1", old), ("v2", new))}
    local = run("check", tmp_path / "lora", "--from", paths["v1"], "--to", paths["v2"], "--json").record
    assert ran.record["verdict"] == local["verdict"]
    assert ran.record["distance"] == pytest.approx(local["distance"], rel=0.05)
    assert ran.record["similarity"] == pytest.approx(local["similarity"], abs=0.01)
    assert ran.record["from"]["fingerprint"] == local["from"]["fingerprint"]
    assert "sample of their rows" in ran.record["reasons"][-1]
    assert ran.record["from"]["path"] == "org/v1"


def test_unrelated_bases_are_refused_from_a_sample_too(hub: Hub, tmp_path: Path, run: Run) -> None:
    hub.repos["org/v1"], hub.repos["org/v3"] = files_of(wide(0)), files_of(wide(1))
    made = lora({name: tensor.float() for name, tensor in wide(0).items()}, rank=2)
    hub.repos["me/lora"] = adapter_files(made, tmp_path / "lora")
    ran = run("check", "me/lora", "--from", "org/v1", "--to", "org/v3", "--json")
    assert ran.record["verdict"] == "refused"
    weights = sum(len(hub.repos[name]["model.safetensors"]) for name in ("org/v1", "org/v3"))
    assert hub.sent < 0.2 * weights


def test_a_port_downloads_once_into_the_hubs_own_cache(hub: Hub, tmp_path: Path, run: Run) -> None:
    old, new = llama(), drifted(llama(), 0.1)
    hub.repos["org/v1"], hub.repos["org/v2"] = files_of(old), files_of(new)
    hub.repos["me/lora"] = adapter_files(lora(old), tmp_path / "lora")
    ran = run("port", "me/lora", "--from", "org/v1", "--to", "org/v2", "-o", tmp_path / "out", "--quiet")
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/v2", COMMIT)
    paths = [save_base(state, tmp_path / f"{i}.safetensors") for i, state in enumerate((old, new))]
    wanted = port(load_adapter(tmp_path / "lora"), *map(open_base, paths)).adapter
    for ref, delta in deltas(load_adapter(tmp_path / "out")).items():
        assert torch.equal(delta, deltas(wanted)[ref])
    sent = hub.sent
    assert run("port", "me/lora", "--from", "org/v1", "--to", "org/v2", "-o", tmp_path / "again", "-q").code == 0
    assert hub.sent == sent, "the second time, nothing is read"
    assert (tmp_path / "hf-cache" / "models--org--v2" / "refs" / "main").read_text() == COMMIT


def test_a_check_reads_what_was_downloaded_before_from_there(hub: Hub, tmp_path: Path, run: Run) -> None:
    hub.repos["org/v1"], hub.repos["org/v2"] = files_of(llama()), files_of(drifted(llama(), 0.1))
    lora(llama()).save(tmp_path / "lora", format="peft")
    for name in ("org/v1", "org/v2"):
        open_base(name)
    sent = hub.sent
    ran = run("check", tmp_path / "lora", "--from", "org/v1", "--to", "org/v2", "--json")
    assert (ran.code, hub.sent) == (0, sent)
    assert not any("sample of their rows" in reason for reason in ran.record["reasons"])


def test_an_adapter_is_inspected_without_its_factors(hub: Hub, tmp_path: Path, run: Run) -> None:
    modules = {path: shape for path, shape in module_names("sd15", "unet").items() if path.endswith("attn1.to_q")}
    tensors = {}
    for path, (out, width) in modules.items():
        key = f"lora_unet_{path.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": torch.ones(64, width), f"{key}.lora_up.weight": torch.ones(out, 64)}
        tensors[f"{key}.alpha"] = torch.tensor(32.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    hub.repos["me/lora"] = {"my_lora.safetensors": (tmp_path / "lora.safetensors").read_bytes()}
    ran = run("inspect", "me/lora:my_lora.safetensors", "--json")
    local = run("inspect", tmp_path / "lora.safetensors", "--json").record
    assert {**ran.record, "file": ""} == {**local, "file": ""}
    assert ran.record["file"] == "me/lora:my_lora.safetensors"
    assert ran.record["components"]["unet"]["alphas"] == [32.0]
    assert hub.sent < 0.1 * len(hub.repos["me/lora"]["my_lora.safetensors"])
    assert run("inspect", "me/lora", "--json").record["components"] == local["components"]


def test_a_pickle_is_downloaded_whole(hub: Hub, tmp_path: Path) -> None:
    state = llama()
    torch.save(state, tmp_path / "m.bin")
    hub.repos["org/old"] = {"pytorch_model.bin": (tmp_path / "m.bin").read_bytes(), "config.json": CONFIG}
    for whole in (False, True):
        base = open_base("org/old", whole=whole)
        assert torch.equal(base.components[MODEL]["lm_head.weight"].load(), state["lm_head.weight"])
        assert not base.partial


def test_the_token_goes_to_the_hub_and_never_to_the_cdn(hub: Hub) -> None:
    hub.private.add("org/name")
    hub.repos["org/name"] = files_of(llama())
    open_base("org/name", whole=False).components[MODEL]["lm_head.weight"].load()
    open_base("org/name")
    assert {request.token for request in hub.requests if request.server == "hub"} == {"Bearer hf_averysecrettoken"}
    assert {request.token for request in hub.requests if request.server == "cdn"} == {None}


def test_the_signed_link_is_asked_for_once(hub: Hub) -> None:
    hub.repos["org/name"] = files_of(llama())
    base = open_base("org/name", whole=False)
    for name in list(base.components[MODEL])[:5]:
        base.components[MODEL][name].load()
    assert len([path for path in hub.paths() if path.endswith("model.safetensors")]) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("org/absent", ["org/absent: is no path that exists, and no repository", "hf auth login"]),
        ("org/private", ["is no path that exists, and no repository"]),
        ("org/gated", ["org/gated: its authors ask for consent first", "Accept its terms at http", "/org/gated"]),
        ("org/name@nowhere", ["org/name@nowhere: the hub has no such revision"]),
        ("org/name:absent.safetensors", ["no such file or folder", "It has model.safetensors"]),
        ("org/gguf", ["org/gguf: the repository holds 2 GGUF files. Name one of them, as org/gguf:a.Q4_0.gguf"]),
        ("org/empty", ["org/empty: this folder holds no model weights"]),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_the_hub_refuses_is_one_line_with_a_remedy(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, given: str, words: list[str], whole: bool
) -> None:
    hub.repos |= {name: files_of(llama()) for name in ("org/name", "org/private", "org/gated")}
    hub.repos["org/empty"] = {"README.md": b"nothing"}
    hub.repos["org/gguf"] = {"a.Q4_0.gguf": b"GGUF", "a.Q8_0.gguf": b"GGUF", "config.json": b"{}"}
    hub.private.add("org/private")
    hub.gated.add("org/gated")
    if given == "org/private":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    text = line(given, whole=whole)
    for word in words:
        assert word in text


def test_offline_what_was_downloaded_is_used_and_the_rest_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/name"] = files_of(llama())
    hub.repos["org/other"] = files_of(llama())
    fingerprint = open_base("org/name").fingerprint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.requests)
    assert open_base("org/name").fingerprint == fingerprint
    assert open_base("org/name:model.safetensors", whole=False).fingerprint == fingerprint
    text = line("org/other")
    assert "HF_HUB_OFFLINE forbids" in text
    assert "hf download org/other" in text
    assert len(hub.requests) == asked


def test_without_a_network_what_was_downloaded_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/name"] = files_of(llama())
    fingerprint = open_base("org/name").fingerprint
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert open_base("org/name").fingerprint == fingerprint
    assert "the hub does not answer" in line("org/other")


@pytest.mark.parametrize(
    "name", ["../../escape.safetensors", "/etc/x.safetensors", "a\\..\\b.safetensors", "x\0y.json"]
)
def test_a_name_that_leads_out_of_the_repository_is_never_made(hub: Hub, name: str) -> None:
    hub.repos["org/evil"] = {name: b"x" * 100, **files_of(llama())}
    base = open_base("org/evil", whole=False)
    assert set(base.components) == {MODEL}
    assert not any("escape" in path or "/etc" in path for path in hub.paths() if "resolve" in path)


def test_the_environments_address_is_read_at_each_call(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/name"] = files_of(llama())
    hub.faults.append(Fault("/api/", "404", 99))
    assert "no repository on the hub" in line("org/name")
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    hub.faults.clear()
    assert open_base("org/name", whole=False).components


def test_a_base_on_the_hub_is_identified_by_the_hash_that_the_hub_lists(hub: Hub, tmp_path: Path, run: Run) -> None:
    states = {"org/v1": wide(0), "org/v2": wide(1)}
    hub.repos |= {name: files_of(state) for name, state in states.items()}
    hub.repos["org/small"] = files_of(llama())
    raw = hub.repos["org/v2"]["model.safetensors"]
    sha256, legacy = hashlib.sha256(raw).hexdigest(), hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    adapter = lora({name: tensor.float() for name, tensor in wide(0).items()}, rank=2)
    for number, metadata in enumerate(({"ss_new_sd_model_hash": sha256}, {"ss_sd_model_hash": legacy})):
        replace(adapter, metadata=metadata).save(tmp_path / str(number), format="peft")
        ran = run("identify", tmp_path / str(number), "org/v1", "org/v2", "org/small", "--json")
        assert ran.code == 0, ran.err
        assert ran.record["found"] == "org/v2"
        assert [candidate["match"] for candidate in ran.record["candidates"]][1:] == ["other", "unfit"]
    assert hub.sent < 0.2 * len(raw)


def test_an_adapter_that_names_its_hub_base_is_matched_to_it(hub: Hub, tmp_path: Path, run: Run) -> None:
    hub.repos |= {name: files_of(llama()) for name in ("org/v1", "org/v2")}
    lora(llama()).save(tmp_path / "lora", format="peft")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "org/v2", "revision": None}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    assert run("identify", tmp_path / "lora", "org/v1", "org/v2", "--json").record["found"] == "org/v2"


def test_verify_gets_all_that_a_model_needs_to_run(hub: Hub) -> None:
    unet, vae, text = (save(llama(seed)) for seed in range(3))
    files = {
        "model_index.json": b"{}",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": unet,
        "unet/diffusion_pytorch_model.fp16.safetensors": unet[:-4],
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": vae,
        "text_encoder/config.json": b"{}",
        "text_encoder/model.safetensors": text,
        "tokenizer/vocab.json": b"{}",
        "scheduler/scheduler_config.json": b"{}",
        "whole.safetensors": unet[:-8],
    }
    hub.repos["org/pipeline"] = files
    place = download_runnable(HubId("org/pipeline"))
    found = {file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()}
    left = {"unet/diffusion_pytorch_model.fp16.safetensors", "whole.safetensors"}
    assert found == set(files) - left
