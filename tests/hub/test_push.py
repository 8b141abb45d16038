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
from regraft.report.schema import CheckReport, Effect, Interval, VerifyReport
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


def _forecast(run: Run, adapter: Path, old: Path, new: Path, file: Path) -> CheckReport:
    result = run("check", adapter, "--from", old, "--to", new, "--json")
    assert result.code == 0, result.err
    file.write_text(result.out, encoding="utf-8")
    return parse(CheckReport, result.out)


def _measured(file: Path, **more: object) -> VerifyReport:
    """A record of `verify`, with figures that tell themselves apart."""

    def effect(mean: float) -> dict[str, Interval]:
        names = ("effect_cosine", "effect_norm_ratio", "kl")
        return {name: Interval(mean=mean + i, low=mean + i - 0.1, high=mean + i + 0.1) for i, name in enumerate(names)}

    undefined = Interval(mean=None, low=None, high=None, reason="it changes nothing")
    none = Effect(effect_cosine=undefined, effect_norm_ratio=undefined)
    facts = {"original": "/home/me/secret/a", "ported": "/home/me/secret/b", "model_class": "M", "n_inputs": 12}
    facts |= {"source": "/home/me/secret/v1", "target": "org/v2", "inputs": "texts | of both", "summary": "s"}
    given = {**facts, "seconds": 1.0, "controls": {"copy": Effect(**effect(0.2)), "none": none}, **more}
    record = VerifyReport(**effect(0.5), **given)  # type: ignore[arg-type]
    file.write_text(record.to_json(), encoding="utf-8")
    return record


def test_given_figures_stand_on_the_card_with_their_intervals_and_controls(
    run: Run, hub: Hub, lora: Path, old: Path, drifted: Path, folder: Path, tmp_path: Path
) -> None:
    check, verify, page = tmp_path / "check.json", tmp_path / "verify.json", tmp_path / "the report.html"
    expected = _forecast(run, folder / "stamped", old, drifted, check).forecast.port
    assert expected is not None
    _measured(verify)
    page.write_text("<html></html>", encoding="utf-8")
    result = run("push", lora, "me/told", "--forecast", check, "--measured", verify, "--report", page, "--json")
    assert result.code == 0, result.err
    assert "the report.html" in hub.repos["me/told"]
    text = hub.repos["me/told"]["README.md"].decode()
    assert "[The report](the%20report.html)" in text
    share, low, high = (f"{100 * value:.0f} %" for value in (expected.recovery, expected.low, expected.high))
    assert f"| port | {share} | {low} to {high} |" in text
    assert f"it rests on {expected.adapters} adapters on {expected.pairs} pairs of bases" in text
    assert "| this port | 0.50 (0.40 to 0.60) | 1.50 (1.40 to 1.60) | 2.5 (2.4 to 2.6) |" in text
    assert "| plain copy | 0.20 (0.10 to 0.30) | 1.20 (1.10 to 1.30) | 2.2 (2.1 to 2.3) |" in text
    assert "| new base alone | – | – | – |" in text
    assert "on **org/v2** beside that of the original on **v1**, over 12 inputs (texts \\| of both)" in text
    assert "secret" not in text
    assert "Nothing: `regraft verify`" not in text
    assert unknown_in(text) == []


def test_figures_of_a_file_without_a_lineage_are_told_too(run: Run, folder: Path, lora: Path, tmp_path: Path) -> None:
    _measured(tmp_path / "verify.json")
    card_ = tmp_path / "card.md"
    result = run("push", folder / "plain", "--card", card_, "--measured", tmp_path / "verify.json")
    assert result.code == 0, result.err
    text = card_.read_text(encoding="utf-8")
    assert "does not say that it was carried over" in text
    assert "| this port |" in text


def test_records_that_are_none_and_forecasts_of_other_shapes_are_refused(
    run: Run, lora: Path, old: Path, folder: Path, tmp_path: Path
) -> None:
    check, verify, bad = tmp_path / "check.json", tmp_path / "verify.json", tmp_path / "bad.json"
    other = tiny.llama(folder / "wider", width=48)
    tiny.lora(load_model(other).main, ("q_proj",)).save(folder / "of another")
    _forecast(run, folder / "of another", other, other, check)
    _measured(verify)
    bad.write_text("{", encoding="utf-8")
    for options, words in (
        (("--forecast", check), "bases of other shapes"),
        (("--forecast", verify), "is no CheckReport"),
        (("--measured", check), "is no VerifyReport"),
        (("--measured", bad), "is no JSON"),
        (("--measured", tmp_path / "gone.json"), "no such file"),
    ):
        told = run("push", lora, "--card", tmp_path / "card.md", *options)
        assert (told.code, words in told.err) == (1, True), told.err
        assert len(told.err.strip().splitlines()) == 1
    assert not (tmp_path / "card.md").exists()


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
