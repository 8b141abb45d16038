"""What goes with the tensors: lineage and training metadata into every format, the card's base, files left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from regraft import load_adapter
from regraft.adapter import Adapter, ModuleRef
from regraft.lineage import KEY, ports_of, with_port
from regraft.tensors import InMemory
from regraft.updates import LowRank

FORMATS = ("peft", "diffusers", "kohya", "cloneofsimo")
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def saved(format: str, folder: Path, **metadata: str) -> Path:
    """A LoRA on SD 1.x's first attention, as a file of that format."""
    paths = [f"{ATTENTION}.{name}" for name in ("to_q", "to_k")]
    updates = {
        ModuleRef("unet", p): LowRank(InMemory(torch.ones(320, 2)), InMemory(torch.ones(2, 320)), 1.0) for p in paths
    }
    path = folder / (f"{format}" if format == "peft" else f"{format}.safetensors")
    written = Adapter(updates, "made here", metadata=metadata, family="sd15")
    written.save(path, format=format)
    return path


@pytest.mark.parametrize("after", FORMATS)
@pytest.mark.parametrize("before", FORMATS)
def test_lineage_and_training_metadata_go_from_every_format_to_every_other(
    before: str, after: str, tmp_path: Path
) -> None:
    adapter = load_adapter(saved(before, tmp_path, ss_tag_frequency="{}", **{"modelspec.title": "mine"}))
    told = {"from": None, "to": {"fingerprint": "v1:0123456789abcdef"}, "method": "copy"}
    adapter = replace(adapter, metadata=with_port(adapter, told), family="sd15")
    again = tmp_path / ("again" if after == "peft" else "again.safetensors")
    adapter.save(again, format=after)
    back = load_adapter(again)
    assert back.format == after
    assert ports_of(back) == [told]
    assert back.metadata["ss_tag_frequency"] == "{}"
    assert back.metadata["modelspec.title"] == "mine"
    # Nothing that describes the old file's layout comes along.
    assert ("unet" in back.metadata) == (after == "cloneofsimo")
    assert any(key.endswith(":rank") for key in back.metadata) == (after == "cloneofsimo")
    assert KEY in back.metadata


def with_card(folder: Path, card: str, base: str = "someone/old-base") -> Adapter:
    path = saved("peft", folder)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    (path / "README.md").write_bytes(card.encode())
    return load_adapter(path)


def card_for(adapter: Adapter, base: str, folder: Path) -> str:
    ported = replace(adapter, config={**(adapter.config or {}), "base_model_name_or_path": base})
    ported.save(folder / "ported")
    return (folder / "ported" / "README.md").read_bytes().decode()


CARD = (
    "---\r\nbase_model: {0}\r\nlibrary_name: peft\r\ntags:\r\n- base_model:adapter:{0}\r\n- lora\r\n---\r\n\r\n# Ü\r\n"
)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_model_card_names_the_new_base(newline: str, tmp_path: Path) -> None:
    card = CARD.replace("\r\n", newline) + "Made from someone/old-base.\nbase_model: someone/old-base\n"
    text = card_for(with_card(tmp_path, card.format("someone/old-base")), "someone/new-base", tmp_path)
    # The front matter alone: what the text tells of the old base stays true.
    _, front, body = text.split("---", 2)
    assert front == card.format("someone/new-base").split("---", 2)[1]
    assert body == card.split("---", 2)[2]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_name_that_yaml_would_misread_is_quoted(quote: str, tmp_path: Path) -> None:
    adapter = with_card(tmp_path, f"---\nbase_model: {quote}old{quote}\n---\n", base="old")
    assert card_for(adapter, "C:\\my bases\\new", tmp_path) == '---\nbase_model: "C:\\\\my bases\\\\new"\n---\n'


@pytest.mark.parametrize(
    "card",
    [
        "---\nbase_model: someone/another\n---\n",
        "---\nbase_model: someone/old-base-large\n---\n",
        "---\nlicense: mit\n---\nbase_model: someone/old-base\n",
        "---\nbase_model: someone/old-base\nno end of the front matter\n",
        "base_model: someone/old-base\n",
        "",
    ],
)
def test_a_card_that_does_not_name_the_old_base_is_copied(card: str, tmp_path: Path) -> None:
    assert card_for(with_card(tmp_path, card), "someone/new-base", tmp_path) == card


def test_a_card_is_copied_where_the_base_stays(tmp_path: Path) -> None:
    card = "---\nbase_model: someone/old-base\n---\n"
    assert card_for(with_card(tmp_path, card), "someone/old-base", tmp_path) == card


def test_weights_files_that_are_not_carried_are_named(tmp_path: Path) -> None:
    path = saved("peft", tmp_path)
    assert load_adapter(path).left_behind == ()
    for name in ("optimizer.pt", "training_args.bin", "other.safetensors", "tokenizer.json"):
        (path / name).write_bytes(b"whatever")
    adapter = load_adapter(path)
    assert adapter.left_behind == ("optimizer.pt", "other.safetensors", "training_args.bin")
    assert set(adapter.sidecars) == {"tokenizer.json"}
    adapter.save(tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    }


MODELS = {"unet": f"{ATTENTION}.to_q", "transformer": "single_transformer_blocks.0.attn.to_q"}


@pytest.mark.parametrize(("component", "path"), MODELS.items(), ids=MODELS)
@pytest.mark.parametrize("prefixed", [False, True], ids=["keys without component", "keys with component"])
def test_one_models_own_file_has_a_config_without_components(
    component: str, path: str, prefixed: bool, tmp_path: Path
) -> None:
    stem = f"{component}.{path}" if prefixed else path
    pair = {f"{stem}.lora_A.weight": torch.ones(2, 320), f"{stem}.lora_B.weight": torch.ones(320, 2)}
    config = {"r": 2, "lora_alpha": 3, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": ["to_q"]}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    save_file(pair, tmp_path / "one.safetensors", metadata=metadata)
    adapter = load_adapter(tmp_path / "one.safetensors")
    assert adapter.unrecognised == ()
    update = adapter.updates[ModuleRef(component, path)]
    assert update.scale == 1.5

    # Written again at half its strength, it is still such a file.
    half = replace(adapter, updates={ModuleRef(component, path): replace(update, scale=0.75)})
    half.save(tmp_path / "half.safetensors")
    with safe_open(tmp_path / "half.safetensors", framework="pt") as handle:
        assert set(handle.keys()) == set(pair)
        again = json.loads(handle.metadata()["lora_adapter_metadata"])
    assert (again["r"], again["lora_alpha"], again["target_modules"]) == (2, 1.5, ["to_q"])
    assert not [field for field in again if "." in field]


def test_diffusers_own_model_file_is_read(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig
    from test_diffusers_judges import UNET

    unet = UNet2DConditionModel(**UNET)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv_in"], rank_pattern={"conv_in": 3}))
    unet.save_lora_adapter(tmp_path)
    adapter = load_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert adapter.unrecognised == ()
    assert adapter.updates[ModuleRef("unet", "conv_in")].scale == 2.0
    assert {u.scale for ref, u in adapter.updates.items() if ref.path != "conv_in"} == {3.0}

    # diffusers takes our file of the same kind, and it says the same.
    adapter.save(tmp_path / "ours.safetensors")
    fresh = UNet2DConditionModel(**UNET)
    fresh.load_lora_adapter(tmp_path, weight_name="ours.safetensors", prefix=None)
    assert fresh.peft_config["default_0"].lora_alpha == 6
