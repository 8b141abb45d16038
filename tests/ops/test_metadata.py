"""Headers stay true after a change, and give nobody away when told to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters_made import unet_lora
from safetensors.torch import save_file

from regraft import Adapter
from regraft.metadata import BaseName, base_hashes, strip_private, with_base

SD15 = {
    "ss_sd_model_name": "old.safetensors",
    "ss_sd_model_hash": "11111111",
    "ss_new_sd_model_hash": "2" * 64,
    "ss_base_model_version": "sd_v1",
    "ss_v2": "False",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "ss_seed": "42",
}


def test_the_bases_hashes_are_those_of_the_webuis(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192
    file = tmp_path / "base.safetensors"
    file.write_bytes(data)
    known = base_hashes(file)
    assert known["ss_new_sd_model_hash"] == hashlib.sha256(data).hexdigest()
    assert known["ss_sd_model_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def test_another_base_of_the_family_changes_name_and_hashes_alone(tmp_path: Path) -> None:
    file = tmp_path / "new.safetensors"
    save_file({"x": torch.ones(4)}, file)
    told = with_base(SD15, BaseName.of(str(file), "sd15"), old_family="sd15")
    assert told["ss_sd_model_name"] == "new.safetensors"
    assert told["ss_new_sd_model_hash"] == hashlib.sha256(file.read_bytes()).hexdigest()
    changed = {key for key in SD15 if told[key] != SD15[key]}
    assert changed == {"ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash"}


def test_a_base_of_another_family_is_named_by_what_sd_scripts_calls_it(tmp_path: Path) -> None:
    told = with_base(SD15, BaseName.of("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"), old_family="sd15")
    assert told["ss_base_model_version"] == "sdxl_base_v1-0"
    assert told["ss_sd_model_name"] == "stabilityai/stable-diffusion-xl-base-1.0"
    # A hub id or a folder has no hash, and the old one's would be false.
    assert "ss_sd_model_hash" not in told
    assert "ss_new_sd_model_hash" not in told
    assert told["ss_seed"] == "42"


def test_the_architecture_is_the_new_familys_or_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"new": "stable-diffusion-xl-v1-base", "other": None}
    monkeypatch.setattr("regraft.metadata.get_family", lambda name: SimpleNamespace(data={"modelspec": known[name]}))
    told = with_base(SD15, BaseName.of("org/name", "new"), old_family="sd15")
    assert told["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    told = with_base(SD15, BaseName.of("org/name", "other"), old_family="sd15")
    assert "modelspec.architecture" not in told
    assert "ss_base_model_version" not in told


def test_nothing_is_said_of_a_base_that_was_not_said_before() -> None:
    assert with_base({"ss_seed": "1"}, BaseName.of("org/name", "sdxl"), old_family="sd15") == {"ss_seed": "1"}


PRIVATE = {
    "ss_output_name": "jane_doe_v3",
    "ss_training_comment": "for my friend",
    "ss_dataset_dirs": json.dumps({"10_jane": {"n_repeats": 10, "img_count": 20}}),
    "ss_datasets": json.dumps([{"subsets": [{"image_dir": "10_jane"}]}]),
    "ss_tag_frequency": json.dumps({"10_jane": {"jane doe": 20}}),
    "modelspec.author": "jane",
    "modelspec.title": "jane_doe_v3",
    "modelspec.trigger_phrase": "jane doe",
    "modelspec.thumbnail": "data:image/png;base64,AAAA",
    "ot_config": json.dumps({"workspace_dir": "/home/jane/ot"}),
    "prompt": "{}",
    "workflow": "{}",
    "sample_prompts": "a photo of jane",
    "ss_sd_model_name": "/home/jane/models/base.safetensors",
    "ss_vae_name": "C:\\Users\\jane\\vae.pt",
    "ss_network_args": json.dumps({"weights": "/mnt/data/jane/x.safetensors"}),
    "another_tools_folder": "D:\\loras\\jane",
}
PUBLIC = {
    "ss_network_dim": "6",
    "ss_network_alpha": "3",
    "ss_base_model_version": "sd_v1",
    "ss_learning_rate": "1e-4",
    "ss_caption_dropout_rate": "0.1",
    "ss_optimizer": "AdamW8bit(weight_decay=0.1)",
    "ss_keep_tokens": "0",
    "ss_bucket_info": '{"buckets": {"0": {"resolution": [512, 512], "count": 20}}}',
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.license": "CreativeML Open RAIL",
    "sshs_model_hash": "0" * 64,
}


def test_names_paths_prompts_and_tags_are_taken_out_and_listed() -> None:
    public, removed = strip_private(replace(unet_lora(), metadata={**PRIVATE, **PUBLIC}))
    text = json.dumps(dict(public.metadata))
    for word in ("jane", "friend", "AAAA", "/home", "Users"):
        assert word not in text
    assert PUBLIC.items() <= public.metadata.items()
    assert public.metadata["ss_sd_model_name"] == "base.safetensors"
    assert public.metadata["ss_vae_name"] == "vae.pt"
    assert public.metadata["modelspec.title"] == "LoRA"
    assert {name.removesuffix(" (shortened)") for name in removed} == PRIVATE.keys()


def test_pefts_config_and_folder_keep_what_it_takes_to_run(tmp_path: Path) -> None:
    config = {"r": 4, "base_model_name_or_path": "/home/jane/models/llama", "revision": "main"}
    names = ("tokenizer.json", "vocab.json", "LICENSE.txt", "README.md", "trainer_state.json", "notes.txt")
    adapter = Adapter({}, "peft", config=config, sidecars={name: tmp_path / name for name in names})
    public, removed = strip_private(adapter)
    assert public.config == {"r": 4, "base_model_name_or_path": "llama", "revision": "main"}
    assert set(public.sidecars) == {"tokenizer.json", "vocab.json", "LICENSE.txt"}
    assert removed == [
        "adapter_config.json: base_model_name_or_path (shortened)",
        "README.md",
        "notes.txt",
        "trainer_state.json",
    ]


def test_a_hub_id_is_no_path() -> None:
    config = {"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    public, removed = strip_private(Adapter({}, "peft", config=config))
    assert public.config == config
    assert removed == []


def test_diffusers_own_entries_stay_readable() -> None:
    entries = {"unet.r": 4, "unet.lora_alpha": 4, "unet.base_model_name_or_path": "/home/jane/sd15"}
    adapter = Adapter({}, "diffusers", metadata={"lora_adapter_metadata": json.dumps(entries)})
    public, removed = strip_private(adapter)
    assert json.loads(public.metadata["lora_adapter_metadata"]) == {**entries, "unet.base_model_name_or_path": "sd15"}
    assert removed == ["lora_adapter_metadata (shortened)"]


def test_added_tokens_keep_their_names() -> None:
    adapter = replace(unet_lora(), metadata={"<my prompt>": "<embed>"})
    assert strip_private(adapter)[0].metadata == {"<my prompt>": "<embed>"}
