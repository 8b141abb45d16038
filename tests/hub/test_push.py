"""Publishing an adapter, against a server that takes commits as the hub does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import unknown_in
from hub_server import Hub
from running import Run

import regraft
from regraft import load_adapter, open_base
from regraft.card import card
from regraft.lineage.stamp import stamp
from regraft.report.json_schema import parse
from regraft.report.push_schema import PushReport
from regraft.runtime import load_model
from verify import tiny


@pytest.fixture(scope="module")
def lora(folder: Path, old: Path, drifted: Path) -> Path:
    """Stamped with its base, and ported."""
    tiny.lora(load_model(old).main, ("q_proj", "v_proj"), size=1.0).save(folder / "plain")
    stamp(folder / "plain", open_base(old), folder / "stamped")
    regraft.port(load_adapter(folder / "stamped"), open_base(old), open_base(drifted), "lora-x").save(folder / "ported")
    (folder / "ported" / "optimizer.pt").write_bytes(b"state of a training")
    return folder / "ported"


def _front(text: str) -> dict[str, object]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_an_adapter_is_sent_in_one_commit_with_its_card(run: Run, hub: Hub, lora: Path, tmp_path: Path) -> None:
    picture = tmp_path / "grid one.png"
    picture.write_bytes(b"\x89PNG")
    asked = ("push", lora, "me/mine", "--license", "apache-2.0", "--picture", picture, "--private", "--json")
    result = run(*asked)
    assert result.code == 0, result.err
    record = parse(PushReport, result.out)
    files = hub.repos["me/mine"]
    assert (
        sorted(files)
        == record.files
        == ["README.md", "adapter_config.json", "adapter_model.safetensors", "grid one.png"]
    )
    assert files["adapter_model.safetensors"] == (lora / "adapter_model.safetensors").read_bytes()
    assert "me/mine" in hub.private
    assert hub.url in record.address
    text = files["README.md"].decode()
    assert "![grid one.png](grid%20one.png)" in text
    assert _front(text)["license"] == "apache-2.0"
    assert "by `lora-x`" in text.replace("\\-", "-")
    # It is there already, and gets another commit.
    again = run(*asked)
    assert again.code == 0, again.err


def test_large_files_go_the_way_of_large_files(run: Run, hub: Hub, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    # The newer way, Xet's, is a program of its own that no local server speaks with.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.lfs = True
    result = run("push", lora, "me/large", "--json")
    assert result.code == 0, result.err
    assert hub.repos["me/large"]["adapter_model.safetensors"] == (lora / "adapter_model.safetensors").read_bytes()


def test_the_card_alone_needs_no_hub(run: Run, lora: Path, tmp_path: Path) -> None:
    file = tmp_path / "card.md"
    result = run("push", lora, "--card", file)
    assert result.code == 0, result.err
    text = file.read_text(encoding="utf-8")
    document = regraft.lineage.lineage_of(load_adapter(lora))
    assert document is not None
    assert document["base"]["fingerprint"] in text
    assert "modules were carried" in text
    assert "Nothing: `regraft verify` measures" in text
    assert unknown_in(text) == []
    assert _front(text)["tags"][:2] == ["lora", "regraft"]  # type: ignore[index]
    again = run("push", lora, "--card", file)
    assert (again.code, "exists already" in again.err) == (1, True)


def test_what_was_measured_is_told(lora: Path) -> None:
    adapter = load_adapter(lora)
    document = regraft.lineage.lineage_of(adapter)
    assert document is not None
    figure = {"measure": "effect_cosine", "value": 0.9312, "low": 0.91, "high": 0.95, "how": "a | b <i>"}
    document["ports"][0] |= {"fidelity": [figure], "forced": True, "verdict": "refused"}
    document["base"]["name"] = "org/new-base"
    told = card(regraft_with(adapter, document), "x")
    assert "| effect\\_cosine | 0.931 | 0.910 to 0.950 | a \\| b &lt;i&gt; |" in told
    assert "Forecast beforehand: *refused*, overridden" in told
    assert (_front(told)["base_model"], _front(told)["base_model_relation"]) == ("org/new-base", "adapter")


def regraft_with(adapter: regraft.Adapter, document: dict[str, object]) -> regraft.Adapter:
    from dataclasses import replace

    return replace(adapter, metadata={**adapter.metadata, regraft.lineage.KEY: json.dumps(document)})


def test_hostile_words_stay_words(lora: Path) -> None:
    adapter = load_adapter(lora)
    document = regraft.lineage.lineage_of(adapter)
    assert document is not None
    hostile = "x\n---\nlicense: mine\n# <script>alert(1)</script> [a](javascript:b) \x1b[31m"
    document["base"]["name"] = hostile
    document["ports"][0]["lost"] = [{"modules": {"model": ["a"]}, "status": "skipped", "reason": hostile}]
    told = card(regraft_with(adapter, document), hostile, license=hostile)
    assert "<script>" not in told.split("---\n", 2)[2]
    assert "](javascript" not in told.split("---\n", 2)[2]
    assert "\x1b" not in told.split("---\n", 2)[2]
    front = _front(told)
    assert front["license"] == hostile
    assert "base_model" not in front


def test_refusals_are_one_line(run: Run, hub: Hub, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.read_only = True
    for options, code, words in (
        ((lora,), 2, "ORG/NAME or --card"),
        ((lora, "me/mine", "--card", tmp_path / "c.md"), 2, "ORG/NAME or --card"),
        ((lora, "no name"), 1, "is no name of a repository"),
        ((lora, "me/mine@v1"), 1, "is no name of a repository"),
        ((lora, "me/mine"), 1, "does not let you write there"),
        ((lora, "me/mine", "--picture", lora / "adapter_config.json"), 2, "is no picture"),
        ((lora, "me/mine", "--picture", tmp_path / "gone.png"), 1, "gone.png"),
        ((tmp_path / "gone", "me/mine"), 1, "gone"),
    ):
        told = run("push", *options)
        assert (told.code, words in told.err) == (code, True), told.err
        assert len(told.err.strip().splitlines()) == 1
        assert "hf_averysecrettoken" not in told.err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = run("push", lora, "me/mine")
    assert (told.code, "HF_HUB_OFFLINE forbids it" in told.err) == (1, True), told.err
